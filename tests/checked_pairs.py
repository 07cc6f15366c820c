"""Recorded pairs with engines in three precisions, built once.

In: a pair's name. Out: a `CheckedPair`, of which a test may take a copy to damage.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from checked_bundles import context_of, trained_pair

from c2c_export.build import build
from c2c_export.build_plan import BuildOptions
from c2c_export.check.level import CheckContext
from c2c_export.check.prompts import read_calibration

PRECISIONS = ("fp32", "int8", "int4")
ENGINES = tuple(f"ort-cpu-{precision}" for precision in PRECISIONS)


@dataclass(frozen=True)
class CheckedPair:
    """A recorded pair's bundle, with engines for the CPU in `PRECISIONS`."""

    name: str
    bundle: Path

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
        trained, prompts = trained_pair(self.bundle, self.name), read_calibration(None).prompts[:1]
        return context_of(bundle, self.name, engine, trained=trained, prompts=prompts)


def make_checked_pair(name: str, exported: Path, folder: Path) -> CheckedPair:
    """Copy the bundle of the recorded pair of that name into `folder`, and build its engines."""
    bundle = folder / exported.name
    shutil.copytree(exported, bundle)
    for precision in PRECISIONS[1:]:
        build(BuildOptions(bundle, "ort-cpu", precision), lambda _: contextlib.nullcontext())
    return CheckedPair(name, bundle)


FindPair = Callable[[str], CheckedPair]
