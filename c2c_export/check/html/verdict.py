"""Verdicts in words: what each level asks, why an engine failed and where, and what a check was run with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from c2c_export.check.html.allowance import tolerance_text
from c2c_export.check.html.numbers import short
from c2c_export.check.report import CheckReport, EngineReport
from c2c_export.check_record import LEVELS, CheckRecord, Divergence, LevelName, LevelRecord

MEANINGS: Mapping[LevelName, str] = {
    "sources": "The trained files are those of the export, and gates, layer map, alignment and tokenizers are theirs.",
    "weights": "Every trained parameter and constant is in the engine's graphs, as exactly as the precision allows.",
    "graphs": "Each graph computes what the torch modules compute with the engine's own weights.",
    "caches": "The fused caches are those of the trained models, layer by layer.",
    "logits": "The first new token is predicted as the trained models predict it.",
    "generation": "Greedy answers are those of the trained models.",
    "questions": "Questions with choices are answered as the trained models answer them.",
}


@dataclass(frozen=True)
class Failure:
    """The first level that failed, and what it found first."""

    level: LevelName
    place: str
    """See `place`; empty where no place is known."""
    message: str


@dataclass(frozen=True)
class Circumstances:
    """What a check was run with, and the engines that it holds for."""

    engines: Sequence[str]
    calibration: str
    num_prompts: int
    versions: Sequence[tuple[str, str]]


def first_failure(check: CheckRecord) -> Failure | None:
    """Why `check` failed; None if no level did."""
    if not check.failed_levels:
        return None
    level = check.failed_levels[0]
    if level.divergences:
        first = level.divergences[0]
        return Failure(level.name, place(first), first.message)
    return Failure(level.name, "", _first_number_beyond(level))


def place(divergence: Divergence) -> str:
    """Where it is, as far as it is known: `fuser0, layer 3, key, head 1, token 17`."""
    numbered = [("layer", divergence.layer), ("", divergence.kind), ("head", divergence.head)]
    numbered.append(("token", divergence.token))
    parts = [] if divergence.graph is None else [divergence.graph]
    parts += [f"{name} {value}".strip() for name, value in numbered if value is not None]
    return ", ".join(parts)


def levels_not_run(check: CheckRecord) -> list[LevelName]:
    """The levels that the check was not asked for."""
    run = {level.name for level in check.levels}
    return [name for name in LEVELS if name not in run]


def circumstances(report: CheckReport) -> list[Circumstances]:
    """Calibration and versions of all checks, equal ones once, in the order of the engines."""
    found: dict[tuple[str, int, tuple[tuple[str, str], ...]], list[str]] = {}
    for engine in report.engines:
        check = engine.check
        key = (check.calibration, check.num_prompts, tuple(sorted(check.versions.items())))
        found.setdefault(key, []).append(engine.engine)
    return [Circumstances(engines, *key) for key, engines in found.items()]


def compared_measurements(engines: Sequence[EngineReport]) -> list[tuple[LevelName, str]]:
    """Every measurement of the levels that run whole engines, as level and name, in the order in which they appear."""
    whole: tuple[LevelName, ...] = ("caches", "logits", "generation", "questions")
    found = {
        (level.name, measurement.name): None
        for name in whole
        for engine in engines
        for level in engine.check.levels
        if level.name == name
        for measurement in level.measurements
    }
    return list(found)


def _first_number_beyond(level: LevelRecord) -> str:
    for measurement in level.measurements:
        if not measurement.passed:
            return f"{measurement.name} is {short(measurement.value)}, expected {tolerance_text(measurement)}"
    return "it gives no reason"
