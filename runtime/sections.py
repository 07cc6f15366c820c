"""A chat as one model reads it: rendered by its chat template, encoded, and cut into template and message sections.

In: messages and a model's tokenizer. Out: the model's token ids and the token range of every section, cut where the
reference implementation cuts; and the comparison of two models' cuts, which must pair the same messages. Not covered:
the positions at which the sections are read, and the sharer's tokens in a message section (`runtime.prompt`). Nothing
here imports torch or transformers.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from c2c_export.chat_template import render
from c2c_export.errors import PromptError
from c2c_export.tokenizer import BundledTokenizer, TokenizedText
from runtime.messages import Message


class UnfusedMessageWarning(UserWarning):
    """A message is read by all models of an aligned pair but not fused: no chat template keeps its text unchanged."""


@dataclass(frozen=True)
class Part:
    """Tokens [start, stop) of one model's chat: the text of message number `message`, or template text (None)."""

    start: int
    stop: int
    message: int | None = None

    @property
    def is_message(self) -> bool:
        """Whether these tokens are the text of a message."""
        return self.message is not None


@dataclass(frozen=True)
class Rendering:
    """A chat as one model reads it: its token ids, cut into template and message parts from the first to the last."""

    ids: list[int]
    parts: list[Part]

    @classmethod
    def of(cls, tokenizer: BundledTokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> "Rendering":
        """Render `messages` for the model of this tokenizer; `PromptError` as in `encode_chat`."""
        text, encoded = encode_chat(tokenizer, messages, add_generation_prompt)
        num_tokens = len(encoded.ids)
        find = _TokenFinder(encoded.offsets)
        parts: list[Part] = []
        done = 0
        for message, first_char, end_char in _content_spans(text, messages):
            start, stop = find.tokens_of(first_char, end_char)
            if done < start:
                parts.append(Part(done, start))
            # A message found before the previous one repeats tokens, here as in the reference.
            parts.append(Part(start, stop, message))
            done = stop
        if done < num_tokens:
            parts.append(Part(done, num_tokens))
        return cls(encoded.ids, parts)

    def part_ids(self, index: int) -> list[int]:
        """The token ids of part number `index`."""
        part = self.parts[index]
        return self.ids[part.start : part.stop]

    @property
    def found(self) -> list[int]:
        """The numbers of the messages whose text has a part, rising."""
        return [part.message for part in self.parts if part.message is not None]


def encode_chat(
    tokenizer: BundledTokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[str, TokenizedText]:
    """The text that the chat template makes of `messages`, and its tokens.

    Raises `PromptError` when the template refuses the messages, or renders them to nothing.
    """
    text = render(
        tokenizer.chat_template,
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=add_generation_prompt,
        variables=tokenizer.special.template_variables,
    )
    encoded = tokenizer.encode(text)
    if not encoded.ids:
        raise PromptError("a chat template renders these messages to nothing; expected at least one token")
    return text, encoded


def check_same_parts(messages: Sequence[Message], ours: Rendering, theirs: Rendering, sharer: int) -> None:
    """Check that the receiver's and a sharer's renderings have the same messages and template parts, in one order.

    Raises `PromptError` that names the first message found on one side only, or where one side lacks template text.
    """
    other = f"sharer {sharer}"
    if ours.found != theirs.found:
        # Not left to the kinds below: those agree when each side lacks another message.
        number = min(set(ours.found) ^ set(theirs.found))
        has, lacks = ("the receiver", other) if number in ours.found else (other, "the receiver")
        raise PromptError(
            f"{_describe(messages, number)}: its text is in the prompt rendered for {has}, but not, unchanged, in that "
            f"for {lacks}, whose chat template drops or changes it (some drop the system turn, some trim spaces); "
            "change the message, or use chat templates that keep message texts as they are"
        )
    our_kinds = [part.is_message for part in ours.parts]
    their_kinds = [part.is_message for part in theirs.parts]
    if our_kinds == their_kinds:
        return
    # The same messages on both sides, so template text stands before one of them, or at the end, on one side only.
    differs = next((i for i, (a, b) in enumerate(zip(our_kinds, their_kinds, strict=False)) if a != b), None)
    if differs is None:
        place = "after the last message"
        ours_has_text = len(our_kinds) > len(their_kinds)
    else:
        ours_has_text = not our_kinds[differs]
        # The messages before it are in both, so their count gives the next one.
        place = f"before {_describe(messages, ours.found[sum(our_kinds[:differs])])}"
    has, lacks = ("the receiver", other) if ours_has_text else (other, "the receiver")
    raise PromptError(
        f"{place}: the chat template of {has} has text there, that of {lacks} has none; "
        "use chat templates that agree on where messages begin and end"
    )


def warn_of_unfused(messages: Sequence[Message], rendering: Rendering) -> None:
    """Issue an `UnfusedMessageWarning` for every message with text that has no part in `rendering`.

    To be called when all models' renderings have passed `check_same_parts`, so that one of them stands for all.
    """
    found = set(rendering.found)
    for number, message in enumerate(messages):
        if message.content and number not in found:
            # With a registry of its own: the module's would hold every text that was ever warned of.
            warnings.warn_explicit(
                f"{_describe(messages, number)}: no chat template keeps its text unchanged, so it is not fused, as in "
                "the reference; remove spaces around it, or use chat templates that keep message texts as they are",
                UnfusedMessageWarning,
                filename=__file__,
                lineno=1,
                module=__name__,
                registry={},
            )


def _describe(messages: Sequence[Message], number: int) -> str:
    message = messages[number]
    return f"message {number} ({message.role}, {message.content[:40]!r})"


def _content_spans(text: str, messages: Sequence[Message]) -> Iterator[tuple[int, int, int]]:
    # The character range of every message that is found in a rendered chat: message number, start, stop.
    search_from = 0
    for number, message in enumerate(messages):
        content = message.content
        if not content:
            continue
        start = _closed_occurrence(text, content, search_from)
        if start < 0:
            start = text.find(content, search_from)
            if start < 0:
                start = text.find(content)
            if start < 0 or _is_inside_begin_token(text, start):
                continue
        search_from = start + len(content)
        yield number, start, search_from


def _closed_occurrence(text: str, content: str, search_from: int) -> int:
    # The first occurrence that a special token (anything with "<") or the end of the text follows, else -1.
    # Searched with the "<", not hit by hit: a text that says one thing over and over has as many hits as messages.
    start = text.find(f"{content}<", search_from)
    last = len(text) - len(content)
    if start < 0 and last >= search_from and text.endswith(content):
        return last
    return start


def _is_inside_begin_token(text: str, start: int) -> bool:
    # The reference does not take a hit inside <|begin_of_text|> for a message's text; 10 and 20 are its numbers.
    before = text[max(0, start - 10) : start]
    around = text[max(0, start - 20) : start + 20]
    return "<" in before and ">" not in before and "begin_of_text" in around


class _TokenFinder:
    """Finds the tokens of a range of characters, in a time that does not grow with the text."""

    def __init__(self, offsets: Sequence[tuple[int, int]]) -> None:
        pairs = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        # Offsets need not rise, and the first token beyond a character is where the largest one so far is.
        self._starts, self._ends = np.maximum.accumulate(pairs[:, 0]), np.maximum.accumulate(pairs[:, 1])

    def tokens_of(self, first_char: int, end_char: int) -> tuple[int, int]:
        """From the first token that ends after the text's start to the last one that starts before its end."""
        start = int(np.searchsorted(self._ends, first_char, side="right"))
        return start, max(start, int(np.searchsorted(self._starts, end_char, side="left")))
