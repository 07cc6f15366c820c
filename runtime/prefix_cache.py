"""Rows of former prompts, kept to begin further ones with: shared system prompts, few-shot turns, turns of a chat.

Kept are host copies, so that slots are free at once. What is reused is exact (`runtime.slot_state`), in fused sections
too: their unfused rows are kept beside the final ones, so that a section that goes on differently is fused anew without
being prefilled anew. Rows of generated tokens are not kept: a step of one token rounds otherwise than a prompt does, so
that an answer would depend on what happens to be kept.

Least recently used prompts go first when a budget of memory is exceeded. Looking for one takes as long beside five
thousand others, which may all begin alike, as beside a few (0.3 ms). Not thread-safe.
"""

from collections.abc import Collection

import numpy as np

from runtime.kept_rows import KeptRows
from runtime.prefill import Prefiller
from runtime.slot_state import FusedRows, Reuse, SlotState, find_reuse

_WORTHWHILE_ROWS = 8
"""Fewer are computed faster than they are looked for, copied and kept."""
_MOST_COMPARED = 16
"""Kept prompts that one is compared with, row by row: those that begin like it for longest, and were used last."""


class PrefixCache:
    """Prompts' rows, by recent use, of one bundle's engine."""

    def __init__(self, prefiller: Prefiller, max_bytes: int) -> None:
        """Keep at most `max_bytes`; 0 keeps nothing."""
        self._prefiller, self._max_bytes = prefiller, max_bytes
        self._kept: dict[KeptRows, list[int]] = {}
        """The least recently used first, each with its `_beginnings`."""
        self._by_beginning: dict[int, dict[KeptRows, None]] = {}
        self._num_set_aside = 0
        self.num_bytes = 0
        """What is kept now, and what is set aside."""

    def __len__(self) -> int:
        return len(self._kept)

    def set_aside(self, target: SlotState, reuse: Reuse) -> int:
        """Make room for a copy of a prompt's rows that is made from now on; its bytes, 0 where it is not to be made.

        That is where the prompt itself could go on from few of its rows, or from no more than the `reuse` that `find`
        gave; and where there is no room beside the other copies that are being made. What was set aside is given back
        before the copy is added, or when it is given up.
        """
        own = self._own_reuse(target, target.fused)
        if own.num_rows < _WORTHWHILE_ROWS or own.num_rows <= reuse.num_rows:
            return 0
        num_bytes = self._bytes_of(target)
        if num_bytes > self._max_bytes - self._num_set_aside:
            return 0
        self._num_set_aside += num_bytes
        self.num_bytes += num_bytes
        self._shrink()
        return num_bytes

    def give_back(self, num_bytes: int) -> None:
        """What was set aside is not needed any more."""
        self._num_set_aside -= num_bytes
        self.num_bytes -= num_bytes

    def _bytes_of(self, target: SlotState) -> int:
        receiver = self._prefiller.receiver.pool
        fused_rows = sum(section.stop - section.start for section in target.fused)
        num_bytes = (target.num_rows + fused_rows) * receiver.row_bytes
        for number, tokens in target.sharers.items():
            num_bytes += len(tokens.ids) * self._prefiller.sharers[number].pool.row_bytes
        return num_bytes

    def find(self, target: SlotState) -> tuple[KeptRows | None, Reuse]:
        """The prompt that saves most, and what of it; None and nothing where none saves anything.

        Of many that begin alike equally far, only those that were used last are looked at.
        """
        wide = self._prefiller.wide
        best, best_reuse = None, find_reuse(SlotState(), target, wide)
        for kept in self._alike(_beginnings(target)):
            reuse = find_reuse(kept.state, target, wide, kept.unfused)
            if reuse.num_rows >= _WORTHWHILE_ROWS and _worth(reuse) > _worth(best_reuse):
                best, best_reuse = kept, reuse
        if best is not None:
            self._put(best, self._remove(best))
        return best, best_reuse

    def add(self, kept: KeptRows) -> None:
        """Keep a prompt, in place of those that are its beginning; what is used least goes where it does not fit."""
        if kept.num_bytes > self._max_bytes - self._num_set_aside:
            return
        beginnings = _beginnings(kept.state)
        for old in self._alike(beginnings):
            covered = find_reuse(kept.state, old.state, self._prefiller.wide, kept.unfused)
            own = self._own_reuse(old.state, old.unfused)
            if covered.num_rows >= own.num_rows and covered.sharer_rows == own.sharer_rows:
                self._remove(old)
        self._put(kept, beginnings)
        self._shrink()

    def _shrink(self) -> None:
        while self.num_bytes > self._max_bytes:
            self._remove(next(iter(self._kept)))

    def _own_reuse(self, state: SlotState, unfused: Collection[FusedRows]) -> Reuse:
        """What a prompt's rows are to the same prompt."""
        return find_reuse(state, state, self._prefiller.wide, unfused)

    def _alike(self, beginnings: list[int]) -> list[KeptRows]:
        """Kept prompts with the longest of these beginnings, each the last used first."""
        found: dict[KeptRows, None] = {}
        for beginning in reversed(beginnings):
            alike = self._by_beginning.get(beginning, {})
            if len(alike) > len(found):  # those with a longer beginning are among them
                for kept in reversed(alike):
                    found[kept] = None
                    if len(found) == _MOST_COMPARED:
                        return list(found)
        return list(found)

    def _put(self, kept: KeptRows, beginnings: list[int]) -> None:
        self._kept[kept] = beginnings
        for beginning in beginnings:
            self._by_beginning.setdefault(beginning, {})[kept] = None
        self.num_bytes += kept.num_bytes

    def _remove(self, kept: KeptRows) -> list[int]:
        """Keep it no more; gives its beginnings."""
        beginnings = self._kept.pop(kept)
        for beginning in beginnings:
            alike = self._by_beginning[beginning]
            del alike[kept]
            if not alike:
                del self._by_beginning[beginning]
        self.num_bytes -= kept.num_bytes
        return beginnings


def _beginnings(state: SlotState) -> list[int]:
    """Hashes of a prompt's first 8, 16, … rows without its last one: tokens and positions of the receiver's."""
    tokens = np.stack([state.receiver.ids, state.receiver.position_ids], axis=1)
    hashes, so_far = [], 0
    num_beginnings = (state.num_rows - 1) // _WORTHWHILE_ROWS
    for block in tokens[: num_beginnings * _WORTHWHILE_ROWS].reshape(num_beginnings, 2 * _WORTHWHILE_ROWS):
        so_far = hash((so_far, block.tobytes()))
        hashes.append(so_far)
    return hashes


def _worth(reuse: Reuse) -> tuple[int, int]:
    return reuse.num_rows + sum(reuse.sharer_rows.values()), reuse.num_sections
