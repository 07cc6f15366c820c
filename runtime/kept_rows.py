"""Rows of caches that were copied out of a slot, to be put into another: of a prompt's beginning, or of a sharer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from runtime.prompt import ModelTokens

CacheRows = Mapping[str, NDArray[Any]]
"""By name of a cache ("key.<layer>", "value.<layer>"): the rows of n tokens, [H, n, D]."""


@dataclass(frozen=True, eq=False)
class SharerRows:
    """All that a fuser reads of one sharer's caches: the rows of n tokens."""

    number: int
    """The sharer's."""
    tokens: ModelTokens
    rows: CacheRows
