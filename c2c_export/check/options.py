"""What a check is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from c2c_export.check_record import LEVELS, LevelName


@dataclass(frozen=True)
class CheckOptions:
    """What to check, and against what. None takes the default."""

    bundle: Path
    receiver: str | None = None
    """The trained models, as given to `c2c-export pair`; None takes the sources that the manifest names."""
    sharers: Sequence[str] = ()
    fusers: Sequence[str] = ()
    receiver_chat_template: Path | None = None
    """The file that was given at export, where it lies elsewhere now; None takes the one that the manifest names."""
    sharer_chat_templates: Sequence[Path] = ()
    engine: str | None = None
    """A target such as `ort-cpu`; None checks every engine of the manifest."""
    precision: str | None = None
    """None checks every precision that the bundle has of it."""
    prompts: Path | None = None
    """A calibration file (JSON Lines); None takes the prompts that come with the package."""
    levels: Sequence[LevelName] = tuple(level for level in LEVELS if level != "questions")
    questions: Path | None = None
    """A JSON Lines file of questions with choices; given, the level `questions` runs too."""
    new_tokens: int = 32
    """Greedy tokens of the level `generation`."""
    bisect: bool = False
    """Where a level of graphs fails, name the node and the module where the error first passes the tolerance."""
    report: Path | None = None
    """Write the report to this file, as HTML."""
    json_file: Path | None = None
    save_results: Path | None = None
    """A folder for Polygraphy's `RunResults` of both sides, graph by graph."""
    num_threads: int | None = None
