"""What was compared when a graph diverged, and whether a guess explains what the engine gave."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from c2c_export.check.comparing import RowsResult, row_errors, rows_of
from c2c_export.check.feeds.feed import GraphFeed

_EXPLAINS = 0.1
"""A guess that fits leaves at most this share of the error."""


@dataclass(frozen=True, eq=False)
class Diverged:
    """One feed of which an output left its tolerance: both sides' outputs, and how they compare."""

    feed: GraphFeed
    expected: Mapping[str, NDArray[Any]]
    """Of the trained modules."""
    found: Mapping[str, NDArray[Any]]
    """Of the engine."""
    results: Mapping[str, RowsResult]
    output: str
    """The first output that left its tolerance."""

    @property
    def result(self) -> RowsResult:
        """How that output compares."""
        return self.results[self.output]

    def expected_rows(self, name: str) -> NDArray[Any]:
        """The written rows [B,H,S,D] of the trained modules' output."""
        return rows_of(self.expected[name], self.feed.written)

    def found_rows(self, name: str) -> NDArray[Any]:
        """The written rows [B,H,S,D] of the engine's output."""
        return rows_of(self.found[name], self.feed.written)

    def failed(self, name: str) -> bool:
        """Whether this output left its tolerance; False where it was not compared."""
        return name in self.results and not self.results[name]


def explains(guess: NDArray[Any], found: NDArray[Any], error: float, tolerance: float) -> bool:
    """Whether `guess` [...,D] is so near to `found` that it leaves a tenth of `error`, or what is tolerated."""
    if guess.shape != found.shape:
        return False
    return float(row_errors(guess, found).max(initial=0.0)) <= max(tolerance, _EXPLAINS * error)


def pair_lengths(rows: NDArray[Any]) -> NDArray[Any]:
    """The lengths [...,D/2] of the pairs that a rotary embedding turns: whatever the angle, they stay the same."""
    first, second = np.split(rows, 2, axis=-1)
    return np.hypot(first, second)
