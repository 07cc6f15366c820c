"""From generated token ids to text, one token at a time, cut at the first stop string.

In: a `tokenizers.Tokenizer`, stop strings, and token ids as they are generated. Out: pieces of text that no later
token can change; together they are exactly `tokenizer.decode(all ids, skip_special_tokens=True)`, cut where the
first stop string begins.

The library decodes all ids at every step: a window of recent ones would be cheaper, but decoders look back (a run of
byte tokens, a stripped first space), and the time, some hundred microseconds at a thousand tokens, is small against
that of a step.
"""

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from c2c_export.errors import UsageError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The form that the ByteFallback decoder reads as a byte; its number parser also takes a plus sign.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")


class Detokenizer:
    """Turns token ids into text that is final as soon as it is returned.

    Held back is the end of the text as long as it is an incomplete character, a run of byte tokens (which become one
    U+FFFD each if the run turns out invalid at its end), or what could become a stop string.

    `stop`: strings that end the text before their first occurrence; the earliest beginning counts. Raises
    `UsageError` for an empty or non-string stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        added_tokens = tokenizer.get_added_tokens_decoder().values()
        self._special_tokens = {token.content for token in added_tokens if token.special}
        self._stop_filter = _StopFilter(stop)
        self._ids: list[int] = []
        self._decoded = ""
        self._emitted: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string appeared; the text ends before it."""
        return self._stop_filter.stopped

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._emitted)

    def push(self, token_id: int) -> str:
        """Take the next token and return the new text that is final, "" if none is (or a stop string appeared).

        An id that the tokenizer does not know adds nothing, as in `decode`.
        """
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._special_tokens or self.stopped:
            return ""
        self._ids.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            return ""
        return self._emit(self._stop_filter.push(self._advance(self._decode().rstrip(_REPLACEMENT))))

    def finish(self) -> str:
        """Say that no token follows: return the text held back so far ("" after a stop string, or if called again)."""
        return self._emit(self._stop_filter.push(self._advance(self._decode())) + self._stop_filter.finish())

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def _advance(self, text: str) -> str:
        """What `text` has more than was decoded before."""
        if not text.startswith(self._decoded):
            return ""  # only its end was taken back; it comes again with a later token, or in finish()
        new, self._decoded = text[len(self._decoded) :], text
        return new

    def _emit(self, text: str) -> str:
        if text:
            self._emitted.append(text)
        return text


class _StopFilter:
    """Passes text on, except what is or could become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            raise UsageError(f"stop: {stop!r} is one string; expected a list of strings")
        for string in stop:
            if not isinstance(string, str) or not string:
                raise UsageError(f"stop: {string!r} is not allowed; expected strings of at least one character")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = self._first_occurrence()
        undecided = self._first_possible_beginning()
        # a stop string that may have begun earlier takes precedence over one already complete: wait for its rest
        if found is not None and found <= undecided:
            return self._stop_at(found)
        emitted, self._held = self._held[:undecided], self._held[undecided:]
        return emitted

    def finish(self) -> str:
        if self.stopped:
            return ""
        found = self._first_occurrence()
        if found is not None:
            return self._stop_at(found)
        emitted, self._held = self._held, ""
        return emitted

    def _stop_at(self, position: int) -> str:
        emitted, self._held = self._held[:position], ""
        self.stopped = True
        return emitted

    def _first_occurrence(self) -> int | None:
        positions = (self._held.find(string) for string in self._stop)
        return min((position for position in positions if position >= 0), default=None)

    def _first_possible_beginning(self) -> int:
        """Where the held text ends in the beginning of a stop string, or its length."""
        length = len(self._held)
        for position in range(max(0, length - self._longest + 1), length):
            rest = self._held[position:]
            if any(len(string) > len(rest) and string.startswith(rest) for string in self._stop):
                return position
        return length
