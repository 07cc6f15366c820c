"""Calls of a fuser, as the runtime makes them, and some with random caches.

In: the caches of both models after real prompts, which rows of them a plan fuses, and both cache layouts. Out: feeds

- every fused section of the prompts, over the prompts' own caches;
- one row, the last that the capacity has;
- several rows behind others, from sharer rows with gaps between them, all of it random.

With `separate_unfused` the rows before any fuser are inputs of their own, and the caches hold others' corrections.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from c2c_export.check.feeds.caches import SEED, CacheLayout, Caches, as_inputs, sizes_of
from c2c_export.check.feeds.feed import GraphFeed

_SHARER_SEED = SEED + 1


@dataclass(frozen=True, eq=False)
class FusedPrompt:
    """One prompt's caches, [1,H,C,D] each, and its fused sections."""

    receiver: Caches
    sharer: Caches
    num_rows: int
    """Of the receiver in use."""
    num_sharer_rows: int
    sections: Sequence[tuple[range, NDArray[np.int64]]]
    """Receiver rows, and the sharer row [N] that stands opposite each."""


def fuser_feeds(
    receiver: CacheLayout, sharer: CacheLayout, prompts: Sequence[FusedPrompt], *, separate_unfused: bool
) -> Iterator[GraphFeed]:
    """The feeds of the module's docstring, in that order."""
    sizes: dict[str, float] = {}
    sharer_sizes: dict[str, float] = {}
    for number, prompt in enumerate(prompts):
        sizes = sizes_of(prompt.receiver, prompt.num_rows)
        sharer_sizes = sizes_of(prompt.sharer, prompt.num_sharer_rows)
        for rows, sharer_rows in prompt.sections:
            name = f"prompt {number}, rows {rows.start} to {rows.stop - 1}"
            yield _feed(name, prompt.receiver, prompt.sharer, rows, sharer_rows, separate_unfused)
    random, sharer_random = receiver.random(1, sizes), sharer.random(1, sharer_sizes, _SHARER_SEED)
    last = min(receiver.capacity, sharer.capacity) - 1
    yield _feed("the last row", random, sharer_random, range(last, last + 1), np.array([last // 2]), separate_unfused)
    count = max(1, min(17, last // 3))
    rows = range(last // 3, last // 3 + count)
    sharer_rows = np.arange(count) * 2 + 1  # every second row: opposite a gap lies no receiver token
    yield _feed("random rows", random, sharer_random, rows, sharer_rows, separate_unfused)


def _feed(
    name: str,
    receiver: Caches,
    sharer: Caches,
    rows: range,
    sharer_rows: NDArray[np.int64],
    separate_unfused: bool,
) -> GraphFeed:
    inputs = {
        "sharer_rows": sharer_rows,
        "receiver_rows": np.asarray(rows, dtype=np.int64),
        "write_index": np.array([rows.start]),
        **as_inputs(receiver),
        **as_inputs(sharer, "sharer_"),
    }
    if separate_unfused:
        # Not what the cache holds: by then another fuser may have changed it.
        unfused = {name: 0.75 * array[:, :, rows.start : rows.stop] for name, array in receiver.items()}
        inputs |= as_inputs(unfused, "unfused_")
    return GraphFeed(name, inputs, (rows,))
