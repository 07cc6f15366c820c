"""What every level is given, and what it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.check.held_pair import HeldPair
from c2c_export.check.options import CheckOptions
from c2c_export.check.prompts import CalibrationPrompt
from c2c_export.check.report import LayerCaches, ProjectorDetails, PromptDetails, QuestionScore
from c2c_export.check_record import Divergence, Measurement

if TYPE_CHECKING:
    from c2c_export.check.engine import CheckedEngine
    from c2c_export.check.trained.pair import TrainedPair


@dataclass(frozen=True)
class CheckContext:
    """One engine's check: the two sides, and the prompts that both are given."""

    options: CheckOptions
    bundle: Bundle
    name: str
    """The engine's name in the manifest."""
    record: EngineRecord
    trained: "TrainedPair"
    engine: "CheckedEngine"
    prompts: Sequence[CalibrationPrompt]
    held: HeldPair = field(default_factory=HeldPair)
    """The trained pair with the engine's own weights."""


@dataclass(frozen=True)
class LevelResult:
    """What a level found. It passed if no measurement left its tolerance and nothing diverged."""

    measurements: Sequence[Measurement] = ()
    divergences: Sequence[Divergence] = ()
    caches: Sequence[LayerCaches] = ()
    projectors: Sequence[ProjectorDetails] = ()
    prompts: Sequence[PromptDetails] = ()
    questions: Sequence[QuestionScore] = field(default=())

    @property
    def passed(self) -> bool:
        """See the class."""
        return not self.divergences and all(measurement.passed for measurement in self.measurements)


Level = Callable[[CheckContext], LevelResult]
