"""The prompt: from chat messages or token ids to what each model reads and which parts of it are fused.

In: messages (or receiver token ids), the receiver's and the sharers' tokenizers, the alignment tables. Out: a `Plan`
with every model's real tokens at their positions, and the prompt cut into fused and unfused sections; token for token
what the reference implementation reads. Padding, which only shifts positions, is never among the tokens.

A position counts the padded prompt: in an aligned prompt a template section is as long as the longest of its versions,
and a model whose version is shorter leaves a gap. Not covered: how a chat is cut into template and message sections
(`runtime.sections`), limits on the length (the caller knows the capacity), and the rows of a cache (`runtime.cache`).
Nothing here imports torch or transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from c2c_export.errors import C2CError, UsageError
from c2c_export.tokenizer import BundledTokenizer
from runtime.messages import Message
from runtime.sections import Rendering, check_same_parts, encode_chat, warn_of_unfused

_Int64Array = npt.NDArray[np.int64]


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
        Warns with `UnfusedMessageWarning` of a message whose text is found in none: all models of an aligned pair read
        it, but it is not fused.
        """
        if self._aligned and sharers:
            plan = self._plan_aligned(messages, sharers, add_generation_prompt)
        else:
            _, encoded = encode_chat(self._receiver, messages, add_generation_prompt)
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

    def continuation_ids(
        self, messages: Sequence[Message] | None, ids: Sequence[int], generated: Sequence[int], text: str
    ) -> list[int]:
        """The receiver's tokens of `text` where it continues a chat (or `ids`, if None) and what was `generated` since.

        The text before it and all of it are tokenised, and what the longer row has more is returned: a word's tokens
        depend on what stands before it. Raises `UsageError` when there is nothing more, or when `text` and the end of
        what is before it become one token.
        """
        before = self._receiver.backend.decode([*ids, *generated], skip_special_tokens=False)
        if messages is not None:
            before = encode_chat(self._receiver, messages, add_generation_prompt=True)[0] + before
        known, whole = self._receiver.encode(before).ids, self._receiver.encode(before + text).ids
        if whole[: len(known)] != known:
            raise UsageError(
                f"the continuation {text!r} begins inside a token, together with the end of the prompt, "
                f"{before[-20:]!r}; give it as token ids"
            )
        if len(whole) == len(known):
            raise UsageError(f"the continuation {text!r} has no tokens; expected at least one")
        return whole[len(known) :]

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
        ours = Rendering.of(self._receiver, messages, add_generation_prompt)
        theirs = {s: Rendering.of(self._sharers[s], messages, add_generation_prompt) for s in sharers}
        for sharer, rendering in theirs.items():
            check_same_parts(messages, ours, rendering, sharer)
        warn_of_unfused(messages, ours)
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


def parse_ids(ids: Sequence[int] | npt.NDArray[Any], name: str = "input_ids") -> _Int64Array:
    """Token ids as int64 [n]; `UsageError`, with their `name`, when there are none or they are no row of integers."""
    try:
        row = np.asarray(ids)
    except ValueError as error:
        raise UsageError(f"{name} is not one row; expected a flat list of token ids") from error
    if row.size == 0:
        raise UsageError(f"{name} is empty; expected at least one token id")
    if row.ndim != 1:
        raise UsageError(f"{name} has shape {list(row.shape)}; expected a flat list of token ids")
    if row.dtype.kind not in "iu":
        raise UsageError(f"{name} holds values of type {row.dtype.name}; expected integer token ids")
    return row.astype(np.int64)
