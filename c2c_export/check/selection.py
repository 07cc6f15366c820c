"""Which of a bundle's engines a check is about, and which of them this machine can run.

In: a bundle and the target and precision that were asked for. Out: records by name, and why others cannot be checked.
"""

from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.errors import C2CError, UsageError
from engines.select import ORT_CUDA, portable_on_cuda, why_not_here


def engines_to_check(
    bundle: Bundle, target: str | None, precision: str | None
) -> tuple[dict[str, EngineRecord], dict[str, str]]:
    """The engines of that target and precision that run here, by name, and of the others why they do not.

    None takes all that the manifest has. `ort-cuda` in fp32 runs the portable graphs and is in the manifest only once
    it was checked, so it must be asked for. Raises `UsageError` where there are none, and `C2CError` where this machine
    can run none of them.
    """
    engines = dict(bundle.manifest.engines)
    if target == ORT_CUDA:
        engines.setdefault(f"{ORT_CUDA}-fp32", portable_on_cuda(bundle))
    wanted = {
        name: record
        for name, record in engines.items()
        if target in (None, record.target) and precision in (None, record.precision)
    }
    if not wanted:
        asked_for = " in ".join(part for part in (target or "engine", precision) if part)
        raise UsageError(f"{bundle.root} has no {asked_for}; it has {', '.join(bundle.manifest.engines)}")
    obstacles: dict[str, str] = {}
    for name, record in wanted.items():
        obstacle = why_not_here(bundle, record)
        if obstacle is not None:
            obstacles[name] = obstacle
    runnable = {name: record for name, record in wanted.items() if name not in obstacles}
    if not runnable:
        listed = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items())
        raise C2CError(f"this machine cannot run any engine that is to be checked: {listed}")
    return runnable, obstacles
