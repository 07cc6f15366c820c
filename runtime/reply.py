"""One generation in the making: from token ids as they are chosen to text, and when it ends."""

from collections.abc import Collection, Sequence
from enum import Enum

from tokenizers import Tokenizer

from c2c_export.errors import AnswerTooLongError, PromptTooLongError, UsageError
from runtime.detokenizer import Detokenizer


def generation_limit(max_new_tokens: int | None, num_rows: int, room: int, capacity: int) -> int:
    """How many tokens may be generated: `max_new_tokens`, or `room` for None.

    `num_rows` tokens are there, and `room` more have a place in the bundle's `capacity`. Raises `UsageError` when there
    is no room, or less than is asked for, or `max_new_tokens` is no number of tokens.
    """
    if room < 1:
        raise PromptTooLongError(
            f"the session's {num_rows} tokens fill the bundle's capacity of {capacity}; "
            "export with a larger --max-length"
        )
    if max_new_tokens is None:
        return room
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens!r}, expected an integer of at least 1")
    if max_new_tokens > room:
        raise AnswerTooLongError(
            f"{num_rows} prompt tokens and max_new_tokens={max_new_tokens} exceed the bundle's capacity of "
            f"{capacity}; ask for at most {room}, shorten the prompt, or export with a larger --max-length"
        )
    return max_new_tokens


class EndedBy(Enum):
    """What ended a generation."""

    STOP_TOKEN = "stop token"
    STOP_STRING = "stop string"
    LIMIT = "limit"


class Reply:
    """The tokens and the text of one generation. It ends with a stop token, a stop string, or at its limit."""

    def __init__(
        self, tokenizer: Tokenizer, *, limit: int, stop_ids: Collection[int] = (), stop: str | Sequence[str] = ()
    ) -> None:
        """`limit` is the number of tokens to generate at most. Raises `UsageError` for stop strings that are none."""
        if not isinstance(stop, Sequence):
            raise UsageError(f"stop is {stop!r}, expected a string or a list of strings")
        self._detokenizer = Detokenizer(tokenizer, (stop,) if isinstance(stop, str) else tuple(stop))
        self._stop_ids = frozenset(stop_ids)
        self._limit = limit
        self.token_ids: list[int] = []
        """All ids, an ending stop token included."""
        self.ended_by: EndedBy | None = None
        """None while it goes on."""

    @property
    def text(self) -> str:
        """What is certain of the text so far."""
        return self._detokenizer.text

    @property
    def finish_reason(self) -> str:
        """ "length" if the limit ended it, else "stop"."""
        return "length" if self.ended_by is EndedBy.LIMIT else "stop"

    def push(self, token_id: int) -> str:
        """Take the next token; the text that is certain now and was not before."""
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            self.ended_by = EndedBy.STOP_TOKEN
            return ""
        text = self._detokenizer.push(token_id)
        if self._detokenizer.stopped:
            self.ended_by = EndedBy.STOP_STRING
        elif len(self.token_ids) >= self._limit:
            self.ended_by = EndedBy.LIMIT
        return text

    def finish(self) -> str:
        """The text that was held back so far, to be asked once, when it has ended."""
        rest = self._detokenizer.finish()
        # Held back so far, as it might have become an earlier stop string.
        if self._detokenizer.stopped:
            self.ended_by = EndedBy.STOP_STRING
        return rest
