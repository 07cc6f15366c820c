"""What the manifest keeps of an engine's check: whether it passed, each level's numbers, and where it first diverged.

Written by `c2c_export.check`, read by `runtime`, `inspect` and the reports. Nothing here imports torch or transformers.
"""

from typing import Literal

from c2c_export.record import Record

LevelName = Literal["sources", "weights", "graphs", "caches", "logits", "generation", "questions"]
LEVELS: tuple[LevelName, ...] = ("sources", "weights", "graphs", "caches", "logits", "generation", "questions")
"""In the order in which they run: what a later level finds, an earlier one may explain."""

Kind = Literal["key", "value"]


class Divergence(Record):
    """The first thing of a level that left its tolerance, as precisely as the level can tell."""

    graph: str | None = None
    """`receiver`, `sharer0`, `fuser0`, …; None where it is none of them, as an alignment table."""
    layer: int | None = None
    """Of the graph's own model; a fuser's are the receiver's."""
    kind: Kind | None = None
    """Whether it is in a key or in a value."""
    head: int | None = None
    """A key/value head."""
    token: int | None = None
    """Counted from 0 among the real tokens of the prompt."""
    message: str
    """One or two sentences: what was found, what was expected and, where it can be told, what it looks like."""


class Measurement(Record):
    """One number of a level, and what it had to be."""

    name: str
    """Such as `max error`; unique in its level."""
    value: float
    at_most: float | None = None
    """The tolerance of an error; None where the number is only told or has a lower bound."""
    at_least: float | None = None
    """The tolerance of an agreement."""

    @property
    def passed(self) -> bool:
        """Whether the value is within its tolerance; one that is not a number is not."""
        above = self.at_most is None or self.value <= self.at_most
        below = self.at_least is None or self.value >= self.at_least
        return above and below


class LevelRecord(Record):
    """How one level went."""

    name: LevelName
    passed: bool
    seconds: float
    measurements: tuple[Measurement, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    """The first ones; empty if the level passed."""


class CheckRecord(Record):
    """How an engine's check went, and of what."""

    passed: bool
    date: str
    """UTC, ISO 8601, to the second."""
    versions: dict[str, str]
    """Of the libraries that computed the two sides."""
    calibration: str
    """sha256 of the calibration file; "built in" for the prompts that come with the package."""
    num_prompts: int
    levels: tuple[LevelRecord, ...]

    @property
    def failed_levels(self) -> tuple[LevelRecord, ...]:
        """Those that did not pass, in order."""
        return tuple(level for level in self.levels if not level.passed)
