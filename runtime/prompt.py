"""The prompt: from chat messages or token ids to what each model reads and which parts of it are fused.

In: messages (or receiver token ids), the receiver's and the sharers' tokenizers, the alignment tables. Out: a `Plan`
with every model's real tokens at their positions, and the prompt cut into fused and unfused sections; token for token
what the reference implementation reads. Padding, which only shifts positions, is never among the tokens.

A position counts the padded prompt: in an aligned prompt a template section is as long as the longest of its versions,
and a model whose version is shorter leaves a gap. Not covered: limits on the length (the caller knows the capacity),
and the rows of a cache (`runtime.cache`). Nothing here imports torch or transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from c2c_export.chat_template import render
from c2c_export.errors import C2CError, UsageError
from c2c_export.tokenizer import BundledTokenizer, TokenizedText

_Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `role` is what the chat template knows: system, user, assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Section:
    """A run of prompt positions [start, stop) that is fused, or that is not."""

    start: int
    stop: int
    fused: bool


@dataclass(frozen=True, eq=False)
class ModelTokens:
    """What one model reads: n real tokens, int64 [n], and their positions, int64 [n], rising, with gaps for padding."""

    ids: _Int64Array
    position_ids: _Int64Array


@dataclass(frozen=True, eq=False)
class Plan:
    """A prompt, ready to be prefilled.

    `sections` follow one another from position 0 to `num_positions`, the padded length; neighbours differ in `fused`.
    Every position of a fused section holds a real token of the receiver and of every sharer. `sharers` holds the
    selected ones by number. `closing_padding_id` is the receiver's padding token when its prompt ends in padding (the
    first new token is then read from that token at position `num_positions - 1`), else None.
    """

    sections: tuple[Section, ...]
    receiver: ModelTokens
    sharers: dict[int, ModelTokens]
    num_positions: int
    closing_padding_id: int | None


def parse_messages(prompt: str | Sequence[Mapping[str, Any] | Message]) -> list[Message]:
    """The messages of a chat; a `str` is one user turn.

    Raises `UsageError`, naming the message and the field, for an empty chat, a missing, unknown or wrongly typed field,
    text that is not valid Unicode, and when no message has any text.
    """
    if isinstance(prompt, str):
        messages = [_checked(Message("user", prompt), "the prompt")]
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        messages = [_parse_message(index, entry) for index, entry in enumerate(prompt)]
    else:
        raise UsageError(
            f"the prompt is of type {type(prompt).__name__}; expected text or a list of messages with role and content"
        )
    if not any(message.content.strip() for message in messages):
        raise UsageError("the prompt is empty; expected at least one message with text")
    return messages


class PromptPlanner:
    """Plans prompts for one receiver and its sharers.

    `aligned` pairs need the tokenizer of every sharer and the alignment table of every sharer (int32
    [receiver_vocab], see `c2c_export.alignment`); unaligned pairs need neither, as all read the receiver's ids.
    `receiver_vocab` and `sharer_vocabs` are the numbers of ids that the models embed, against which prompts are
    checked; left out, the receiver's is taken from the tables or its tokenizer, and the sharers' is not checked.
    Raises `C2CError` for an aligned pair whose receiver has no padding token and no end-of-sequence token.
    """

    def __init__(
        self,
        receiver: BundledTokenizer,
        sharers: Sequence[BundledTokenizer],
        tables: Sequence[npt.NDArray[np.int32]],
        aligned: bool,
        *,
        receiver_vocab: int | None = None,
        sharer_vocabs: Sequence[int] | None = None,
    ) -> None:
        if aligned and receiver.special.padding_id is None:
            raise C2CError("the receiver's tokenizer has neither a padding nor an end token; an aligned pair needs one")
        self._receiver = receiver
        self._sharers = tuple(sharers)
        self._tables = tuple(tables)
        self._aligned = aligned
        if receiver_vocab is None:
            receiver_vocab = len(tables[0]) if tables else receiver.vocab_size
        self._receiver_vocab = receiver_vocab
        self._sharer_vocabs = sharer_vocabs

    def plan_messages(
        self, messages: Sequence[Message], *, sharers: Sequence[int], add_generation_prompt: bool = True
    ) -> Plan:
        """Plan a chat for the receiver and the `sharers` of these numbers; with none it is the receiver alone.

        Raises `UsageError` for text with a token that a model does not embed, and `C2CError` when a chat template
        refuses the messages, or when a message's text is found in one model's rendered prompt but not in another's.
        """
        if self._aligned and sharers:
            plan = self._plan_aligned(messages, sharers, add_generation_prompt)
        else:
            _, encoded = _encode_chat(self._receiver, messages, add_generation_prompt)
            plan = self._plan_row(np.array(encoded.ids, dtype=np.int64), sharers)
        self._check_sharers_embed(plan)
        return plan

    def plan_ids(self, ids: Sequence[int] | npt.NDArray[Any], *, sharers: Sequence[int]) -> Plan:
        """Plan receiver token ids, [n]: all but the last are fused with the `sharers`.

        The sharers of an aligned pair read the counterparts of the ids. Raises `UsageError` when `ids` is empty, not a
        row of integers, or holds an id that a model does not embed.
        """
        plan = self._plan_row(parse_ids(ids), sharers)
        self._check_sharers_embed(plan)
        return plan

    def _plan_row(self, ids: _Int64Array, sharers: Sequence[int]) -> Plan:
        # All models have a token at every position: no gaps, and only the last token is not fused.
        _check_range(ids, self._receiver_vocab, self._receiver, "the receiver")
        num_tokens = len(ids)
        positions = np.arange(num_tokens, dtype=np.int64)
        row = _SectionList()
        if sharers:
            row.add(num_tokens - 1, fused=True)
        row.add(num_tokens - row.num_positions, fused=False)
        read = {s: self._tables[s][ids].astype(np.int64) if self._aligned else ids for s in sharers}
        return Plan(
            sections=tuple(row.sections),
            receiver=ModelTokens(ids, positions),
            sharers={s: ModelTokens(sharer_ids, positions) for s, sharer_ids in read.items()},
            num_positions=num_tokens,
            closing_padding_id=None,
        )

    def _plan_aligned(self, messages: Sequence[Message], sharers: Sequence[int], add_generation_prompt: bool) -> Plan:
        ours = _Rendering.of(self._receiver, messages, add_generation_prompt)
        theirs = {s: _Rendering.of(self._sharers[s], messages, add_generation_prompt) for s in sharers}
        for sharer, rendering in theirs.items():
            _check_same_parts(messages, ours, rendering, sharer)
        _check_range(np.array(ours.ids, dtype=np.int64), self._receiver_vocab, self._receiver, "the receiver")

        sections = _SectionList()
        receiver_row = _Row()
        sharer_rows = {s: _Row() for s in sharers}
        for index, part in enumerate(ours.parts):
            start = sections.num_positions
            ids = ours.ids[part.start : part.stop]
            receiver_row.add(ids, start)
            if part.is_message:
                sections.add(len(ids), fused=True)
                for s in sharers:
                    sharer_rows[s].add(self._tables[s][ids].tolist(), start)
            else:
                kept = {s: rendering.part_ids(index) for s, rendering in theirs.items()}
                sections.add(max(len(ids), *map(len, kept.values())), fused=False)
                for s in sharers:
                    sharer_rows[s].add(kept[s], start)

        receiver = receiver_row.tokens()
        ends_in_padding = receiver_row.stop < sections.num_positions
        return Plan(
            sections=tuple(sections.sections),
            receiver=receiver,
            sharers={s: row.tokens() for s, row in sharer_rows.items()},
            num_positions=sections.num_positions,
            closing_padding_id=self._receiver.special.padding_id if ends_in_padding else None,
        )

    def _check_sharers_embed(self, plan: Plan) -> None:
        if self._sharer_vocabs is not None:
            for sharer, tokens in plan.sharers.items():
                tokenizer = self._sharers[sharer] if self._aligned else self._receiver
                _check_range(tokens.ids, self._sharer_vocabs[sharer], tokenizer, f"sharer {sharer}")


@dataclass(frozen=True)
class _Part:
    # Tokens [start, stop) of one model's rendered chat: message number `message`, or template text (None).
    start: int
    stop: int
    message: int | None = None

    @property
    def is_message(self) -> bool:
        return self.message is not None


@dataclass(frozen=True)
class _Rendering:
    # A chat as one model reads it, cut into template and message parts.
    ids: list[int]
    parts: list[_Part]

    @classmethod
    def of(cls, tokenizer: BundledTokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> "_Rendering":
        text, encoded = _encode_chat(tokenizer, messages, add_generation_prompt)
        num_tokens = len(encoded.ids)
        parts: list[_Part] = []
        done = 0
        for message, first_char, end_char in _content_spans(text, messages):
            start, stop = _token_range(encoded.offsets, first_char, end_char)
            if done < start:
                parts.append(_Part(done, start))
            # A message found before the previous one repeats tokens, here as in the reference.
            parts.append(_Part(start, stop, message))
            done = stop
        if done < num_tokens:
            parts.append(_Part(done, num_tokens))
        return cls(encoded.ids, parts)

    def part_ids(self, index: int) -> list[int]:
        part = self.parts[index]
        return self.ids[part.start : part.stop]

    @property
    def found(self) -> list[int]:
        return [part.message for part in self.parts if part.message is not None]


@dataclass
class _SectionList:
    # Sections in the making; neighbours of one kind are one section.
    sections: list[Section] = field(default_factory=list)
    num_positions: int = 0

    def add(self, length: int, fused: bool) -> None:
        if length == 0:
            return
        start = self.num_positions
        self.num_positions += length
        if self.sections and self.sections[-1].fused == fused:
            start = self.sections.pop().start
        self.sections.append(Section(start, self.num_positions, fused))


@dataclass
class _Row:
    # One model's tokens in the making. `stop` is the position after the last one.
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    stop: int = 0

    def add(self, ids: Sequence[int], start: int) -> None:
        if ids:
            self.stop = start + len(ids)
            self.ids.extend(ids)
            self.positions.extend(range(start, self.stop))

    def tokens(self) -> ModelTokens:
        return ModelTokens(np.array(self.ids, dtype=np.int64), np.array(self.positions, dtype=np.int64))


def _encode_chat(
    tokenizer: BundledTokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[str, TokenizedText]:
    text = render(
        tokenizer.chat_template,
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=add_generation_prompt,
        variables=tokenizer.special.template_variables,
    )
    encoded = tokenizer.encode(text)
    if not encoded.ids:
        raise C2CError("a chat template renders these messages to nothing; expected at least one token")
    return text, encoded


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
    start = text.find(content, search_from)
    while start >= 0:
        stop = start + len(content)
        if stop == len(text) or text[stop] == "<":
            return start
        start = text.find(content, start + 1)
    return -1


def _is_inside_begin_token(text: str, start: int) -> bool:
    # The reference does not take a hit inside <|begin_of_text|> for a message's text; 10 and 20 are its numbers.
    before = text[max(0, start - 10) : start]
    around = text[max(0, start - 20) : start + 20]
    return "<" in before and ">" not in before and "begin_of_text" in around


def _token_range(offsets: Sequence[tuple[int, int]], first_char: int, end_char: int) -> tuple[int, int]:
    # From the first token that ends after the text's start to the last one that starts before its end.
    num_tokens = len(offsets)
    start = next((i for i in range(num_tokens) if offsets[i][1] > first_char), num_tokens)
    stop = next((i for i in range(start, num_tokens) if offsets[i][0] >= end_char), num_tokens)
    return start, stop


def _check_same_parts(messages: Sequence[Message], ours: _Rendering, theirs: _Rendering, sharer: int) -> None:
    our_kinds = [part.is_message for part in ours.parts]
    their_kinds = [part.is_message for part in theirs.parts]
    if our_kinds == their_kinds:
        return
    other = f"sharer {sharer}"
    on_one_side = [m for m in range(len(messages)) if (m in ours.found) != (m in theirs.found)]
    if on_one_side:
        number = on_one_side[0]
        has, lacks = ("the receiver", other) if number in ours.found else (other, "the receiver")
        raise C2CError(
            f"{_describe(messages, number)}: its text is in the prompt rendered for {has}, but not, unchanged, in that "
            f"for {lacks}; remove spaces around it, or use chat templates that keep message texts as they are"
        )
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
    raise C2CError(
        f"{place}: the chat template of {has} has text there, that of {lacks} has none; "
        "use chat templates that agree on where messages begin and end"
    )


def _describe(messages: Sequence[Message], number: int) -> str:
    message = messages[number]
    return f"message {number} ({message.role}, {message.content[:40]!r})"


def _parse_message(index: int, entry: object) -> Message:
    where = f"message {index}"
    if isinstance(entry, Message):
        return _checked(entry, where)
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is of type {type(entry).__name__}; expected a mapping with role and content")
    for name in ("role", "content"):
        if name not in entry:
            raise UsageError(f"{where} has no field {name!r}; expected role and content")
    # Clients send unset fields as null; a set one would be lost without a word.
    unknown = [name for name, value in entry.items() if name not in ("role", "content") and value is not None]
    if unknown:
        raise UsageError(f"{where} has a field {unknown[0]!r}, which is not supported; expected role and content")
    return _checked(Message(entry["role"], entry["content"]), where)


def _checked(message: Message, where: str) -> Message:
    fields: tuple[tuple[str, object], ...] = (("role", message.role), ("content", message.content))
    for name, value in fields:
        if not isinstance(value, str):
            raise UsageError(f"{where}: {name} is of type {type(value).__name__}; expected text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{where}: {name} is not valid Unicode (a lone surrogate at character {error.start}); expected text"
            ) from error
    if not message.role:
        raise UsageError(f"{where}: role is empty; expected system, user or assistant")
    return message


def _check_range(ids: _Int64Array, vocab: int, tokenizer: BundledTokenizer, model: str) -> None:
    outside = np.flatnonzero((ids < 0) | (ids >= vocab))
    if outside.size:
        index = int(outside[0])
        token = int(ids[index])
        # Other ids have no text, and the tokenizers library refuses negative ones.
        text = f" ({tokenizer.decode([token])!r})" if 0 <= token < tokenizer.vocab_size else ""
        raise UsageError(
            f"token {index} of the prompt is {token}{text}; expected ids from 0 to {vocab - 1}, the vocabulary of "
            f"{model}"
        )


def parse_ids(ids: Sequence[int] | npt.NDArray[Any]) -> _Int64Array:
    """Token ids as int64 [n]; `UsageError` when there are none, or when they are not a row of integers."""
    try:
        row = np.asarray(ids)
    except ValueError as error:
        raise UsageError("input_ids is not one row; expected a flat list of token ids") from error
    if row.size == 0:
        raise UsageError("input_ids is empty; expected at least one token id")
    if row.ndim != 1:
        raise UsageError(f"input_ids has shape {list(row.shape)}; expected a flat list of token ids")
    if row.dtype.kind not in "iu":
        raise UsageError(f"input_ids holds values of type {row.dtype.name}; expected integer token ids")
    return row.astype(np.int64)
