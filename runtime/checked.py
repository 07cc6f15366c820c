"""Whether an engine was checked against the trained models, and how that went: warn, or refuse.

In: a bundle and the engine that is about to be run. Out: nothing, a warning, or an error. What counts is the manifest's
record, which `c2c-export check` writes. Not covered: whether that check was thorough enough for one's purpose.
"""

import warnings

from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.errors import C2CError

_warned_of: set[tuple[str, str]] = set()


class UncheckedEngineWarning(UserWarning):
    """An engine is run that was never compared with the trained models."""


class FailedEngineError(C2CError):
    """An engine whose check failed. The message names the level, and what to do."""


def refuse_failed(bundle: Bundle, record: EngineRecord) -> None:
    """Raise `FailedEngineError` where the engine's check failed."""
    if record.check is None or record.check.passed:
        return
    level = record.check.failed_levels[0]
    what = f": {level.divergences[0].message}" if level.divergences else ""
    raise FailedEngineError(
        f"{bundle.root}: engine {record.target} in {record.precision} failed its check at level {level.name}{what}\n"
        f"Build it again, and check it with `c2c-export check {bundle.root} --engine {record.target} --precision "
        f"{record.precision}`; to run it all the same, pass allow_failed=True (--allow-failed)"
    )


def warn_of_unchecked(bundle: Bundle, record: EngineRecord) -> None:
    """Warn where the engine was never checked; once per process and engine of a bundle."""
    key = (str(bundle.root.absolute()), f"{record.target}-{record.precision}")
    if record.check is not None or key in _warned_of:
        return
    _warned_of.add(key)
    warnings.warn(
        f"{bundle.root}: engine {record.target} in {record.precision} was never checked against the trained models; "
        "run `c2c-export check` on it, or pass allow_unchecked=True (--allow-unchecked)",
        UncheckedEngineWarning,
        stacklevel=4,
    )
