"""Whether an engine was checked against the trained models, with what, and how that went: warn, or refuse.

In: a bundle and the engine that is about to be run. Out: nothing, a warning, or an error. What counts is the manifest's
record, which `c2c-export check` writes. Not covered: whether that check was thorough enough for one's purpose.
"""

import importlib
import warnings

from c2c_export import __version__
from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.errors import C2CError
from engines.select import ORT_CUDA
from engines.targets import target_of

_warned_of: set[tuple[str, str]] = set()


class UncheckedEngineWarning(UserWarning):
    """An engine is run that was never compared with the trained models, or with other libraries than are here."""


class FailedEngineError(C2CError):
    """An engine whose check failed. The message names the level, and what to do."""


def refuse_failed(bundle: Bundle, record: EngineRecord) -> None:
    """Raise `FailedEngineError` where the engine's check failed."""
    if record.check is None or record.check.passed:
        return
    level = record.check.failed_levels[0]
    what = f": {level.divergences[0].message}" if level.divergences else ""
    again = "Build it again"
    if (record.target, record.precision) == (ORT_CUDA, "fp32"):
        again = "It runs the bundle's portable graphs, which nobody builds: export the bundle again"
    raise FailedEngineError(
        f"{bundle.root}: engine {record.target} in {record.precision} failed its check at level {level.name}{what}\n"
        f"{again}, and check it with `c2c-export check {bundle.root} --engine {record.target} --precision "
        f"{record.precision}`; to run it all the same, pass allow_failed=True (--allow-failed)"
    )


def warn_of_unchecked(bundle: Bundle, record: EngineRecord) -> None:
    """Warn where the engine was never checked, or with another version of what runs it.

    Once per process and engine of a bundle.
    """
    key = (str(bundle.root.absolute()), f"{record.target}-{record.precision}")
    problem = _problem_of(record)
    if problem is None or key in _warned_of:
        return
    _warned_of.add(key)
    warnings.warn(
        f"{bundle.root}: engine {record.target} in {record.precision} was {problem}; "
        "run `c2c-export check` on it, or pass allow_unchecked=True (--allow-unchecked)",
        UncheckedEngineWarning,
        stacklevel=4,
    )


def _problem_of(record: EngineRecord) -> str | None:
    """What a check of this engine leaves open here; None if nothing."""
    if record.check is None:
        return "never checked against the trained models"
    module = target_of(record.target).module
    here = {module: str(importlib.import_module(module).__version__), "c2c-export": __version__}
    checked_with = record.check.versions
    others = [
        f"{name} {checked_with.get(name, 'of an unknown version')}, this is {version}"
        for name, version in here.items()
        if checked_with.get(name) != version
    ]
    return f"checked with {', and with '.join(others)}" if others else None
