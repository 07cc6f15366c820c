"""Which slots one call of a decode step serves: neighbouring ones, as a cache's slots are bound as one view.

Slots between those that are wanted are computed too, into a row that holds nothing yet; where many lie between, or one
of them has no such row, there are several calls. Engines compute each slot by itself, so results do not depend on it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_MAX_GAP = 3
"""Slots between two wanted ones that cost less than another call (measured: docs/benchmarks.md)."""


@dataclass(frozen=True)
class StepSlot:
    """What one slot computes in a step."""

    token_id: int
    position_id: int
    row: int
    """Where it is written."""


def decode_ranges(
    wanted: Mapping[int, StepSlot], spare: Mapping[int, int], capacity: int, max_slots: int | None = None
) -> Iterator[tuple[range, list[StepSlot]]]:
    """Ranges of slots that hold all `wanted` ones, each with what its slots compute.

    `spare` has, for every other slot, the first row that may be written over; `capacity` is no row. An engine that was
    built for so many requests takes `max_slots` in a call.
    """
    slots = sorted(wanted)
    start = slots[0]
    for slot, following in zip(slots, [*slots[1:], None], strict=True):
        if following is not None:
            between = range(slot + 1, following)
            fits = max_slots is None or following - start < max_slots
            if fits and len(between) <= _MAX_GAP and all(spare.get(other, capacity) < capacity for other in between):
                continue
        served = range(start, slot + 1)
        yield served, [wanted.get(other) or StepSlot(0, 0, spare[other]) for other in served]
        if following is not None:
            start = following
