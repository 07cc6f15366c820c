"""Which engines a check is about, and what of its result the manifest keeps."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from c2c_export.bundle import Bundle, EngineRecord, read_manifest, write_manifest
from c2c_export.check import selection
from c2c_export.check.selection import engines_to_check, keep_check
from c2c_export.check_record import CheckRecord, LevelRecord, Measurement
from c2c_export.errors import C2CError, UsageError
from engines.select import portable_on_cuda, wanted_engines

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


def result(value: float = 1.0) -> CheckRecord:
    level = LevelRecord(name="logits", passed=False, seconds=1.0, measurements=(Measurement(name="x", value=value),))
    return CheckRecord(
        passed=False, date="2026-11-27T00:00:00+00:00", versions={}, calibration="", num_prompts=1, levels=(level,)
    )


def test_every_engine_of_the_manifest_is_checked(bundle: Bundle):
    several = with_engine(bundle, "ort-cpu-int4", "ort-cpu", "int4")
    assert engines_to_check(several, None, None).keys() == several.manifest.engines.keys()
    assert list(engines_to_check(several, "ort-cpu", "int4")) == ["ort-cpu-int4"]
    assert list(engines_to_check(several, None, "int4")) == ["ort-cpu-int4"]


def test_an_engine_that_this_machine_cannot_run_is_named_with_those_that_it_can(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    several = with_engine(bundle, "tensorrt-rtx-fp16", "tensorrt-rtx", "fp16")

    def obstacle(_: Bundle, record: EngineRecord) -> str | None:
        return "it needs an NVIDIA GPU" if record.target == "tensorrt-rtx" else None

    monkeypatch.setattr(selection, "why_not_here", obstacle)
    with pytest.raises(C2CError, match=r"tensorrt-rtx-fp16: it needs an NVIDIA GPU\nName one .* --engine ort-cpu") as e:
        engines_to_check(several, None, None)
    assert e.value.exit_code == 1
    with pytest.raises(C2CError, match=r"tensorrt-rtx-fp16: it needs an NVIDIA GPU$") as e:
        engines_to_check(several, "tensorrt-rtx", None)
    assert e.value.exit_code == 1
    assert "ort-cpu-fp32" in engines_to_check(several, "ort-cpu", None)


def test_an_engine_that_the_bundle_does_not_have_is_refused(bundle: Bundle):
    with pytest.raises(UsageError, match="has no tensorrt in fp16; it has ort-cpu-fp32"):
        engines_to_check(bundle, "tensorrt", "fp16")


def test_the_portable_graphs_on_a_gpu_get_a_record_by_their_first_check(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(selection, "why_not_here", lambda *_: None)
    assert "ort-cuda-fp32" not in engines_to_check(bundle, None, None)
    (name,), (record,) = zip(*engines_to_check(bundle, "ort-cuda", "fp32").items(), strict=True)
    assert (name, record) == ("ort-cuda-fp32", portable_on_cuda(bundle))
    keep_check(bundle.root, name, record, result())
    opened = Bundle.open(bundle.root)
    assert opened.manifest.engines[name].check == result()
    # it is the one engine of its kind, and found with its result
    assert [engine.check for engine in wanted_engines(opened, "ort-cuda", "fp32")] == [result()]


def test_a_number_that_is_none_survives_in_the_manifest(bundle: Bundle):
    record = bundle.manifest.engines["ort-cpu-fp32"]
    keep_check(bundle.root, "ort-cpu-fp32", record, result(float("nan")))
    kept = read_manifest(bundle.root).engines["ort-cpu-fp32"].check
    assert kept is not None
    assert kept.levels[0].measurements[0].value != kept.levels[0].measurements[0].value


def test_an_engine_that_was_built_again_meanwhile_is_not_marked(bundle: Bundle):
    checked = bundle.manifest.engines["ort-cpu-fp32"]
    again = checked.model_copy(update={"build": None})
    manifest = bundle.manifest.model_copy(update={"engines": {**bundle.manifest.engines, "ort-cpu-fp32": again}})
    write_manifest(bundle.root, manifest)
    with pytest.raises(C2CError, match="was built again while it was checked"):
        keep_check(bundle.root, "ort-cpu-fp32", checked, result())
    assert read_manifest(bundle.root) == manifest
