"""Which of a bundle's engines a check is about, and where its result is kept.

In: a bundle and the target and precision that were asked for. Out: records by name; a check's result in the manifest.
"""

from pathlib import Path

from c2c_export.bundle import Bundle, EngineRecord, read_manifest, write_manifest
from c2c_export.bundle_lock import locked
from c2c_export.check_record import CheckRecord
from c2c_export.errors import C2CError, UsageError
from engines.select import ORT_CUDA, portable_on_cuda, why_not_here


def engines_to_check(bundle: Bundle, target: str | None, precision: str | None) -> dict[str, EngineRecord]:
    """The engines of that target and precision, by name; None takes all that the manifest has.

    `ort-cuda` in fp32 runs the portable graphs and is in the manifest only once it was checked, so it must be asked
    for. Raises `UsageError` where there are none, and `C2CError` naming those that this machine cannot run.
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
        asked_for = " in ".join(part for part in (target or "an engine", precision) if part)
        raise UsageError(f"{bundle.root} has no {asked_for}; it has {', '.join(bundle.manifest.engines)}")
    obstacles = {name: why_not_here(bundle, record) for name, record in wanted.items()}
    cannot = [f"{name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle is not None]
    if cannot:
        can = sorted({wanted[name].target for name, obstacle in obstacles.items() if obstacle is None})
        hint = f"\nName one that it can run, with --engine {' or '.join(can)}" if can and target is None else ""
        raise C2CError(f"this machine cannot run every engine that is to be checked: {'; '.join(cannot)}{hint}")
    return wanted


def keep_check(root: Path, name: str, checked: EngineRecord, check: CheckRecord) -> None:
    """Put the result into the manifest of the bundle at `root`, and nothing else.

    Raises `C2CError` when the engine was built again or removed since it was checked.
    """
    with locked(root):
        manifest = read_manifest(root)  # another process may have changed it meanwhile
        present = manifest.engines.get(name)
        if present is None and checked.target == ORT_CUDA and checked.build is None:
            present = checked  # the portable graphs, which nobody builds
        if present is None or _built(present) != _built(checked):
            raise C2CError(f"{root}: engine {name} was built again while it was checked; check it again")
        engines = {**manifest.engines, name: present.model_copy(update={"check": check})}
        write_manifest(root, manifest.model_copy(update={"engines": engines}))


def _built(record: EngineRecord) -> EngineRecord:
    return record.model_copy(update={"check": None})
