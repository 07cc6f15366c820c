"""Which engines a check is about, and which of them this machine can run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.check import selection
from c2c_export.check.selection import engines_to_check
from c2c_export.errors import C2CError, UsageError

PAIR = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture
def bundle(recorded_bundle: Callable[[str], Path], tmp_path: Path) -> Bundle:
    shutil.copytree(recorded_bundle(PAIR), tmp_path / "pair.bundle")
    return Bundle.open(tmp_path / "pair.bundle")


def with_engine(bundle: Bundle, name: str, target: str, precision: str) -> Bundle:
    """The bundle with another record of the same files."""
    record = bundle.manifest.engines["ort-cpu-fp32"].model_copy(update={"target": target, "precision": precision})
    engines = {**bundle.manifest.engines, name: record}
    return Bundle(bundle.root, bundle.manifest.model_copy(update={"engines": engines}))


def test_every_engine_of_the_manifest_is_checked(bundle: Bundle):
    several = with_engine(bundle, "ort-cpu-int4", "ort-cpu", "int4")
    assert engines_to_check(several, None, None)[0].keys() == several.manifest.engines.keys()
    assert list(engines_to_check(several, "ort-cpu", "int4")[0]) == ["ort-cpu-int4"]
    assert list(engines_to_check(several, None, "int4")[0]) == ["ort-cpu-int4"]


def test_an_engine_that_this_machine_cannot_run_is_named_beside_those_that_it_can(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    several = with_engine(bundle, "tensorrt-rtx-fp16", "tensorrt-rtx", "fp16")

    def obstacle(_: Bundle, record: EngineRecord) -> str | None:
        return "it needs an NVIDIA GPU" if record.target == "tensorrt-rtx" else None

    monkeypatch.setattr(selection, "why_not_here", obstacle)
    runnable, obstacles = engines_to_check(several, None, None)
    assert runnable.keys() == bundle.manifest.engines.keys()
    assert obstacles == {"tensorrt-rtx-fp16": "it needs an NVIDIA GPU"}
    assert engines_to_check(several, "ort-cpu", None) == (runnable, {})
    with pytest.raises(C2CError, match=r"cannot run any engine .*: tensorrt-rtx-fp16: it needs an NVIDIA GPU$") as e:
        engines_to_check(several, "tensorrt-rtx", None)
    assert e.value.exit_code == 1


def test_an_engine_that_the_bundle_does_not_have_is_refused(bundle: Bundle):
    with pytest.raises(UsageError, match="has no tensorrt in fp16; it has ort-cpu-fp32"):
        engines_to_check(bundle, "tensorrt", "fp16")
