"""Rows of caches that were copied out of a slot, to be put into another: of a prompt's beginning, or of a sharer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from runtime.prompt import ModelTokens
from runtime.slot_state import FusedRows, SlotState

CacheRows = Mapping[str, NDArray[Any]]
"""By name of a cache ("key.<layer>", "value.<layer>"): the rows of n tokens, [H, n, D], as they lie in memory."""


@dataclass(frozen=True, eq=False)
class SharerRows:
    """All that a fuser reads of one sharer's caches: the rows of n tokens."""

    number: int
    """The sharer's."""
    tokens: ModelTokens
    rows: CacheRows


@dataclass(frozen=True, eq=False)
class KeptRows:
    """A whole prompt's rows, final, and the unfused version of those that were fused."""

    state: SlotState
    receiver: CacheRows
    """Of the receiver's n rows, final."""
    unfused: Mapping[FusedRows, CacheRows]
    """By fused section: its rows before they were fused, of the caches that fusing changes."""
    sharers: Mapping[int, CacheRows]
    """Of each sharer that computed anything."""

    @property
    def num_bytes(self) -> int:
        """What the copies take."""
        caches = (self.receiver, *self.unfused.values(), *self.sharers.values())
        return sum(rows.nbytes for cache in caches for rows in cache.values())
