"""Recorded pairs as a check sees them: bundles with engines in three precisions, and the trained models, made once.

In: a pair's name. Out: a `CheckedPair`, of which a test may take a copy to damage.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from c2c_export.build import build
from c2c_export.build_plan import BuildOptions
from c2c_export.bundle import Bundle
from c2c_export.check.engine import CheckedEngine
from c2c_export.check.level import CheckContext
from c2c_export.check.options import CheckOptions
from c2c_export.check.prompts import read_calibration
from c2c_export.check.trained.pair import TrainedPair

PRECISIONS = ("fp32", "int8", "int4")
ENGINES = tuple(f"ort-cpu-{precision}" for precision in PRECISIONS)


@dataclass(frozen=True, eq=False)
class CheckedPair:
    """A bundle with engines for the CPU in `PRECISIONS`, and what it was exported from."""

    bundle: Path
    options: CheckOptions
    trained: TrainedPair

    @contextlib.contextmanager
    def copy(self, folder: Path) -> Iterator[Path]:
        """A copy of the bundle in `folder`, which is gone afterwards."""
        copied = folder / self.bundle.name
        shutil.copytree(self.bundle, copied)
        try:
            yield copied
        finally:
            shutil.rmtree(copied)

    def context(self, bundle: Path, engine: str) -> CheckContext:
        """What a level is given of `engine` in `bundle`, a copy of this pair's."""
        opened = Bundle.open(bundle)
        record = opened.manifest.engines[engine]
        checked = CheckedEngine(opened, record, 1)
        prompts = read_calibration(None).prompts[:1]
        return CheckContext(self.options, opened, engine, record, self.trained, checked, prompts)


def make_checked_pair(exported: Path, sources: Path, folder: Path) -> CheckedPair:
    """Copy a recorded pair's bundle into `folder`, build its engines, and load its models from `sources`."""
    bundle = folder / exported.name
    shutil.copytree(exported, bundle)
    for precision in PRECISIONS[1:]:
        build(BuildOptions(bundle, "ort-cpu", precision), lambda _: contextlib.nullcontext())
    options = CheckOptions(
        bundle=bundle,
        receiver=str(sources / "receiver"),
        sharers=[str(path) for path in sorted(sources.glob("sharer*"))],
        fusers=[str(path) for path in sorted(sources.glob("fuser*"))],
        num_threads=1,
    )
    return CheckedPair(bundle, options, TrainedPair.load(Bundle.open(bundle).manifest, options))


FindPair = Callable[[str], CheckedPair]
