"""Prompts that are copied out of their slots for the prefix cache, beside everything else.

In: slots whose prompts are to be kept. Out: `KeptRows` in the `PrefixCache`, and slots that are free when their copy is
done. No answer depends on it: where a copy fails, such as for lack of memory, its prompt is not kept.

Called by the scheduler's thread alone.
"""

import logging

from runtime.prefill import Prefill
from runtime.prefix_cache import PrefixCache
from runtime.row_keeper import RowKeeper
from runtime.slot_state import Reuse, SlotState

_log = logging.getLogger(__name__)


class RowKeeping:
    """The copies under way, by slot. What they take counts to the cache's memory from the prompt's prefill on."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._set_aside: dict[int, int] = {}
        """Bytes by slot."""
        self._keepers: dict[int, RowKeeper] = {}
        self._left: dict[int, int] = {}
        """Slots whose request has ended before its copy, with their first row that is not copied."""

    def __bool__(self) -> bool:
        """Whether anything is to be copied."""
        return bool(self._keepers)

    @property
    def left_slots(self) -> dict[int, int]:
        """Slots without a request that are not free yet, each with its first row that may be written over."""
        return dict(self._left)

    def set_aside(self, slot: int, target: SlotState, reuse: Reuse) -> bool:
        """Make room for the copy of a slot's prompt, which goes on from `reuse`; whether it is to be kept."""
        num_bytes = self._cache.set_aside(target, reuse)
        if num_bytes:
            self._set_aside[slot] = num_bytes
        return bool(num_bytes)

    def begin(self, slot: int, prefill: Prefill) -> None:
        """Copy the prompt that the slot holds now, if room was made for it."""
        try:
            keeper = prefill.row_keeper() if slot in self._set_aside else None
        except Exception:
            _log.exception("rows of a prompt could not be kept")
            keeper = None
        if keeper is None:
            self.drop(slot)
        else:
            self._keepers[slot] = keeper

    def advance(self, max_rows: int) -> int:
        """Copy about so many rows, 1 or more, of the prompt that came first; how many were copied."""
        slot, keeper = next(iter(self._keepers.items()))
        copied = 0
        try:
            while copied < max_rows and not keeper.done:
                copied += keeper.advance(max_rows - copied)
            if keeper.done:
                kept = keeper.kept_rows()
                self.drop(slot)
                self._cache.add(kept)
        except Exception:
            _log.exception("rows of a prompt could not be kept")
            self.drop(slot)
        return copied

    @property
    def num_rows_left(self) -> int:
        """Rows that are still to be copied of the prompt that came first."""
        return next(iter(self._keepers.values())).num_rows_left

    def leave(self, slot: int, num_rows: int) -> bool:
        """The slot's request has ended with an answer, its prompt had so many rows; whether the slot is free at once.

        If not, `take_free` gives it when its copy is done.
        """
        if slot not in self._keepers:
            return True
        self._left[slot] = num_rows
        return False

    def take_free(self) -> list[int]:
        """Slots that were left and are free now; each is told once."""
        free = [slot for slot in self._left if slot not in self._keepers]
        for slot in free:
            del self._left[slot]
        return free

    def drop(self, slot: int) -> None:
        """Copy nothing more of the slot's prompt, and give back the memory that was set aside."""
        self._keepers.pop(slot, None)
        self._cache.give_back(self._set_aside.pop(slot, 0))
