"""Copies a prompt's rows out of its slot, some at a time, while the slot's request is answered already.

In: a slot that holds a whole prompt, and the unfused rows of its sections. Out: `KeptRows`. The rows of a prompt stay
as they are while tokens are generated, which are written behind them; so a copy can take its time, until the slot is
another's.
"""

from collections.abc import Mapping

import numpy as np

from runtime.cache import KVCachePool
from runtime.kept_rows import CacheRows, KeptRows
from runtime.slot_state import FusedRows, SlotState


class RowKeeper:
    """One copy under way."""

    def __init__(
        self,
        slot: int,
        state: SlotState,
        receiver: KVCachePool,
        sharers: Mapping[int, KVCachePool],
        unfused: Mapping[FusedRows, CacheRows],
    ) -> None:
        """`state` is what the slot holds; `unfused` has its sections' rows as they were before they were fused."""
        self._slot, self._state = slot, state
        self._unfused = {section: rows for section, rows in unfused.items() if section in state.fused}
        self._receiver = _Copy(receiver, slot, state.num_rows)
        self._sharers = {
            number: _Copy(sharers[number], slot, len(tokens.ids)) for number, tokens in state.sharers.items()
        }

    @property
    def done(self) -> bool:
        """Whether all is copied."""
        return not self.num_rows_left

    @property
    def num_rows_left(self) -> int:
        """Rows that are still to be copied, of all models."""
        return sum(copy.num_left for copy in (self._receiver, *self._sharers.values()))

    def advance(self, max_rows: int) -> int:
        """Copy some rows of one model; how many."""
        copy = next(copy for copy in (self._receiver, *self._sharers.values()) if copy.num_left)
        return copy.advance(max_rows)

    def kept_rows(self) -> KeptRows:
        """What was copied; to be asked when done."""
        sharers = {number: copy.rows for number, copy in self._sharers.items()}
        return KeptRows(self._state, self._receiver.rows, self._unfused, sharers)


class _Copy:
    def __init__(self, pool: KVCachePool, slot: int, num_rows: int) -> None:
        self._pool, self._slot, self._done, self.num_left = pool, slot, 0, num_rows
        self.rows = {
            name: np.empty((rows.shape[0], num_rows, rows.shape[2]), rows.dtype)
            for name, rows in pool.take_rows(pool.names, slot, 0, 0).items()
        }

    def advance(self, max_rows: int) -> int:
        start, stop = self._done, self._done + min(max(1, max_rows), self.num_left)
        for name, rows in self._pool.take_rows(self._pool.names, self._slot, start, stop).items():
            self.rows[name][:, start:stop] = rows
        self._done, self.num_left = stop, self.num_left - (stop - start)
        return stop - start
