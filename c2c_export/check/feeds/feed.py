"""One call of a graph: its inputs, and which rows of which slots it writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class GraphFeed:
    """Inputs by name, as the portable graph's (docs/architecture.md), caches in float32."""

    name: str
    """For messages: what the call is, such as `a prompt of 23 tokens`."""
    inputs: Mapping[str, NDArray[Any]]
    written: Sequence[range]
    """By slot, the rows that the call writes; all others stay as they were fed."""
    over_random_rows: bool = False
    """Whether its tokens attend to random rows. They see masks best, but magnify rounding as no prompt does."""
    adds: str = ""
    """What this call needs beyond those before it: where the others passed, the first thing to look at."""

    @property
    def positions(self) -> NDArray[Any] | None:
        """The positions [B,S] of the written rows; None of a fuser, which knows none."""
        return self.inputs.get("position_ids")

    @property
    def num_rows(self) -> int:
        """Rows in use of the slot that has the most."""
        return max(rows.stop for rows in self.written)
