"""How many rows of a prompt may be computed at once, so that requests that are being answered do not stall for long.

In: how long pieces took so far. Out: a number of rows that is expected to take no longer than the budget. The time of a
row differs by model and grows with the rows before it, so the estimate is that of the last piece that was no mere
remainder; a piece is at most four times that one, as nothing is known about larger ones.
"""

from collections.abc import Hashable

_FIRST_ROWS = 16
_GROWTH = 4
_MARGIN = 0.8


class StallBudget:
    """`seconds` that the pieces between two decode steps may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last: dict[Hashable, tuple[int, float]] = {}

    def used_up(self, spent: float) -> bool:
        """Whether too little is left of the budget for another piece when `spent` seconds of it are.

        A piece reads all of a model's weights, so small ones to use up a budget's end are slower in all.
        """
        return self.seconds - spent < self.seconds / 2

    def rows(self, kind: Hashable, spent: float) -> int:
        """How many rows of a `kind` of work fit when `spent` seconds of the budget are; 0 if it is used up."""
        if self.used_up(spent):
            return 0
        left = self.seconds - spent
        if kind not in self._last:
            return _FIRST_ROWS
        rows, took = self._last[kind]
        return max(1, min(int(rows * _MARGIN * left / took), rows * _GROWTH))

    def measured(self, kind: Hashable, rows: int, seconds: float) -> None:
        """A piece of so many rows, 1 or more, took so long."""
        assert rows >= 1
        last_rows, _ = self._last.get(kind, (0, 0.0))
        if rows >= last_rows / 2 or seconds > self.seconds:
            self._last[kind] = (rows, max(seconds, 1e-6))
