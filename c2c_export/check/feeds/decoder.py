"""Calls of a receiver or a sharer, as the runtime makes them, and some that it would make on another day.

In: the model's tokens of real prompts, its cache layout, its trained side. Out: feeds

- each prompt from row 0, gaps in its positions included, behind it rows of garbage that no token may see;
- the second half of the longest prompt over its first half, and over random rows;
- a prompt with a closing padding row, which sees all others but not itself;
- if the model has a sliding window, a chunk whose positions leave a gap, so that the window ends among its rows;
- a step of one token for several slots, each with another number of the prompt's rows;
- steps over random rows for 2, 3 and 4 slots at once, or for as many as there is memory for, each slot in turn with
  few rows, where one row more or less matters most, and with all rows that the capacity has.

Caches in the feeds are shared between feeds: read, never written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from c2c_export.check.feeds.caches import CacheLayout, Caches, as_inputs, sizes_of, with_rows
from c2c_export.check.feeds.feed import GraphFeed
from c2c_export.check.runner import Trained
from runtime.prompt import ModelTokens

_MOST_SLOTS = 4
_STEP_BYTES = 1_500_000_000
"""What the caches of a step of several slots may take; models with large ones are stepped with fewer, or with one."""


@dataclass(frozen=True, eq=False)
class DecoderPrompt:
    """What one model reads of a prompt, and the padding token that closes it, if any, at its position."""

    tokens: ModelTokens
    closing_padding: tuple[int, int] | None = None
    """Token id and position."""


@dataclass(frozen=True)
class DecoderLimits:
    """What positions and windows a model has."""

    window: int | None
    max_positions: int


def decoder_feeds(
    trained: Trained, layout: CacheLayout, limits: DecoderLimits, prompts: Sequence[DecoderPrompt]
) -> Iterator[GraphFeed]:
    """The feeds of the module's docstring, in that order. Prompts are of at least one token and fit the capacity."""
    empty = layout.random(1, {})
    longest = max(prompts, key=lambda prompt: len(prompt.tokens.ids))
    first = _Call.of_prompt(longest.tokens, empty)
    real = trained.run(first.feed("").inputs)
    num_rows = len(longest.tokens.ids)
    del empty
    num_slots = max(1, min(_MOST_SLOTS, _STEP_BYTES // layout.slot_bytes))
    random = layout.random(num_slots, sizes_of({name: real[name] for name in layout.names}, num_rows))
    garbage = {name: array[:1] for name, array in random.items()}
    for number, prompt in enumerate(prompts):
        call = _Call.of_prompt(prompt.tokens, garbage)
        yield call.feed(f"prompt {number}, {len(prompt.tokens.ids)} tokens")
    half = num_rows // 2
    if half:
        rest = longest.tokens.ids[half:], longest.tokens.position_ids[half:]
        earlier = with_rows(random, {name: real[name] for name in layout.names}, half)
        before, adds = longest.tokens.position_ids[:half], "how rows of earlier calls are seen"
        call = _Call(earlier, *rest, write_index=half, positions_before=before)
        yield call.feed(f"a prompt's second half, from row {half} on", adds=adds)
        call = _Call(garbage, *rest, write_index=half, positions_before=before)
        yield call.feed(f"tokens behind random rows, from row {half} on", over_random_rows=True, adds=adds)
    yield from _padded(prompts, longest, garbage, layout.capacity)
    if limits.window is not None and half:
        yield from _windowed(longest.tokens, half, garbage, limits)
    own = with_rows(random, {name: real[name] for name in layout.names}, num_rows)
    yield _own_step(own, longest.tokens, layout, num_slots)
    yield from _steps(own, random, longest.tokens, layout, limits)


@dataclass(frozen=True, eq=False)
class _Call:
    """One request's call."""

    caches: Caches
    ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    write_index: int = 0
    positions_before: Sequence[int] | NDArray[np.int64] = ()
    num_hidden: int = 0

    @classmethod
    def of_prompt(cls, tokens: ModelTokens, caches: Caches) -> "_Call":
        return cls(caches, tokens.ids, tokens.position_ids)

    def feed(self, name: str, *, over_random_rows: bool = False, adds: str = "") -> GraphFeed:
        num_tokens, capacity = len(self.ids), next(iter(self.caches.values())).shape[2]
        stop = self.write_index + num_tokens
        row_positions = np.zeros((1, capacity), dtype=np.int64)
        row_positions[0, : self.write_index] = self.positions_before
        row_positions[0, self.write_index : stop] = self.position_ids
        inputs = {
            "input_ids": self.ids[None],
            "position_ids": self.position_ids[None],
            "write_index": np.array([self.write_index]),
            "kv_length": np.array([stop - self.num_hidden]),
            "last_token": np.array([num_tokens - 1]),
            "row_position_ids": row_positions,
        }
        return GraphFeed(
            name, {**inputs, **as_inputs(self.caches)}, (range(self.write_index, stop),), over_random_rows, adds
        )


def _padded(
    prompts: Sequence[DecoderPrompt], longest: DecoderPrompt, caches: Caches, capacity: int
) -> Iterator[GraphFeed]:
    """A call that ends in a closing padding row: a prompt's own, else one behind a gap of three positions."""
    prompt = next((prompt for prompt in prompts if prompt.closing_padding is not None), None)
    if prompt is None:
        num_tokens = min(len(longest.tokens.ids), capacity - 1)
        ids, positions = longest.tokens.ids[:num_tokens], longest.tokens.position_ids[:num_tokens]
        prompt = DecoderPrompt(ModelTokens(ids, positions), (int(ids[0]), int(positions[-1]) + 4))
    assert prompt.closing_padding is not None
    token, position = prompt.closing_padding
    ids, positions = np.append(prompt.tokens.ids, token), np.append(prompt.tokens.position_ids, position)
    yield _Call(caches, ids, positions, num_hidden=1).feed(
        "a prompt with a closing padding row", adds="the mask of rows from kv_length on"
    )


def _windowed(tokens: ModelTokens, half: int, caches: Caches, limits: DecoderLimits) -> Iterator[GraphFeed]:
    """The prompt's second half so far behind its first that the window ends among the rows of the first."""
    assert limits.window is not None
    before = np.arange(half)
    # The first new token sees the upper half of the earlier rows, the last one fewer.
    positions = np.arange(len(tokens.ids) - half) + limits.window + half // 2
    if int(positions[-1]) < limits.max_positions:
        call = _Call(caches, tokens.ids[half:], positions, write_index=half, positions_before=before)
        yield call.feed(
            "tokens whose sliding window ends among earlier rows", over_random_rows=True, adds="the sliding window"
        )


def _own_step(own: Caches, tokens: ModelTokens, layout: CacheLayout, num_slots: int) -> GraphFeed:
    """One token for each of several slots, which all have the prompt's rows, each another number of them."""
    num_rows = min(len(tokens.ids), layout.capacity - 1)
    rows = np.array([num_rows, num_rows // 2, min(5, num_rows), min(2, num_rows)][:num_slots])
    positions = np.append(tokens.position_ids[:num_rows], tokens.position_ids[num_rows - 1] + 1)
    row_positions = np.zeros((len(rows), layout.capacity), dtype=np.int64)
    row_positions[:, : num_rows + 1] = positions
    ids = np.append(tokens.ids[:num_rows], tokens.ids[0])
    caches = {name: np.concatenate([array] * len(rows)) for name, array in own.items()}
    return _step_of(caches, ids[rows], row_positions, rows, over_random_rows=False)


def _steps(
    real: Caches, random: Caches, tokens: ModelTokens, layout: CacheLayout, limits: DecoderLimits
) -> Iterator[GraphFeed]:
    """One token for each of several slots; slot 0 has the prompt's own rows, the others random ones."""
    num_slots = len(next(iter(random.values())))
    caches = {name: np.concatenate([real[name], random[name][1:]]) for name in layout.names}
    last_row = layout.capacity - 1
    turns = [last_row, 1, min(5, last_row - 1), min(len(tokens.ids), last_row - 2)]
    for turn in range(_MOST_SLOTS):
        # Fewer slots than turns: every slot still has every number of rows.
        count = num_slots if turn else max(min(2, num_slots), num_slots - 1)
        rows = np.array([turns[(slot + turn) % len(turns)] for slot in range(count)])
        yield _step(caches, tokens, rows, limits)
    if num_slots > 2:
        yield _step(caches, tokens, np.array([2, last_row]), limits)


def _step(caches: Caches, tokens: ModelTokens, rows: NDArray[np.int64], limits: DecoderLimits) -> GraphFeed:
    num_slots, capacity = len(rows), next(iter(caches.values())).shape[2]
    row_positions = np.tile(np.arange(capacity), (num_slots, 1))
    for slot in range(1, num_slots):
        # Each but the first has another gap, where the model has positions left for it.
        row_positions[slot, 2:] += min(slot, limits.max_positions - capacity)
    ids = tokens.ids[np.arange(num_slots) % len(tokens.ids)]
    used = {name: array[:num_slots] for name, array in caches.items()}
    return _step_of(used, ids, row_positions, rows, over_random_rows=True)


def _step_of(
    caches: Caches,
    ids: NDArray[np.int64],
    row_positions: NDArray[np.int64],
    rows: NDArray[np.int64],
    *,
    over_random_rows: bool,
) -> GraphFeed:
    inputs = {
        "input_ids": ids[:, None],
        "position_ids": row_positions[np.arange(len(rows)), rows][:, None],
        "write_index": rows,
        "kv_length": rows + 1,
        "last_token": np.zeros(len(rows), dtype=np.int64),
        "row_position_ids": row_positions,
    }
    name = f"a step of {len(rows)} slots with {', '.join(str(row + 1) for row in rows)} rows"
    written = tuple(range(int(row), int(row) + 1) for row in rows)
    adds = "steps of several slots with rows of their own"
    return GraphFeed(name, {**inputs, **as_inputs(caches)}, written, over_random_rows, adds)
