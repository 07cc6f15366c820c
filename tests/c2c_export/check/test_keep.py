"""What of a check's result the manifest keeps."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checked_bundles import PROMPTS, context_of

from c2c_export.bundle import Bundle, read_manifest, write_manifest
from c2c_export.check import selection
from c2c_export.check.keep import keep_check, why_not_kept
from c2c_export.check.prompts import CalibrationPrompt
from c2c_export.check.selection import engines_to_check
from c2c_export.check_record import LEVELS, CheckRecord, LevelRecord, Measurement
from c2c_export.errors import C2CError
from engines.select import portable_on_cuda, wanted_engines

PAIR = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture
def bundle(recorded_bundle: Callable[[str], Path], tmp_path: Path) -> Bundle:
    shutil.copytree(recorded_bundle(PAIR), tmp_path / "pair.bundle")
    return Bundle.open(tmp_path / "pair.bundle")


def result(value: float = 1.0) -> CheckRecord:
    level = LevelRecord(name="logits", passed=False, seconds=1.0, measurements=(Measurement(name="x", value=value),))
    return CheckRecord(
        passed=False, date="2026-11-27T00:00:00+00:00", versions={}, calibration="", num_prompts=1, levels=(level,)
    )


def test_the_portable_graphs_on_a_gpu_get_a_record_by_their_first_check(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(selection, "why_not_here", lambda *_: None)
    assert "ort-cuda-fp32" not in engines_to_check(bundle, None, None)[0]
    (name,), (record,) = zip(*engines_to_check(bundle, "ort-cuda", "fp32")[0].items(), strict=True)
    assert (name, record) == ("ort-cuda-fp32", portable_on_cuda(bundle))
    keep_check(bundle, name, record, result())
    opened = Bundle.open(bundle.root)
    assert opened.manifest.engines[name].check == result()
    # it is the one engine of its kind, and found with its result
    assert [engine.check for engine in wanted_engines(opened, "ort-cuda", "fp32")] == [result()]


def test_a_number_that_is_none_survives_in_the_manifest(bundle: Bundle):
    record = bundle.manifest.engines["ort-cpu-fp32"]
    keep_check(bundle, "ort-cpu-fp32", record, result(float("nan")))
    kept = read_manifest(bundle.root).engines["ort-cpu-fp32"].check
    assert kept is not None
    assert kept.levels[0].measurements[0].value != kept.levels[0].measurements[0].value


def test_an_engine_that_was_built_again_meanwhile_is_not_marked(bundle: Bundle):
    checked = bundle.manifest.engines["ort-cpu-fp32"]
    again = checked.model_copy(update={"build": None})
    manifest = bundle.manifest.model_copy(update={"engines": {**bundle.manifest.engines, "ort-cpu-fp32": again}})
    write_manifest(bundle.root, manifest)
    with pytest.raises(C2CError, match="was built or exported again while it was checked"):
        keep_check(bundle, "ort-cpu-fp32", checked, result())
    assert read_manifest(bundle.root) == manifest


@pytest.mark.parametrize("name", ["graphs/receiver.onnx", "tokenizers/receiver/tokenizer.json"])
@pytest.mark.parametrize("engine", ["ort-cpu-fp32", "ort-cuda-fp32"])
def test_an_engine_whose_files_were_replaced_meanwhile_is_not_marked(bundle: Bundle, engine: str, name: str):
    records = {**bundle.manifest.engines, "ort-cuda-fp32": portable_on_cuda(bundle)}
    assert name in bundle.manifest.files
    manifest = bundle.manifest.model_copy(update={"files": {**bundle.manifest.files, name: "0" * 64}})
    write_manifest(bundle.root, manifest)
    with pytest.raises(C2CError, match=f"engine {engine} was built or exported again while it was checked"):
        keep_check(bundle, engine, records[engine], result())
    assert read_manifest(bundle.root) == manifest


def test_an_engine_is_marked_although_another_was_built_meanwhile(bundle: Bundle):
    record = bundle.manifest.engines["ort-cpu-fp32"]
    files = {**bundle.manifest.files, "engines/ort-cpu-int8/receiver.onnx": "0" * 64}
    engines = {**bundle.manifest.engines, "ort-cpu-int8": record.model_copy(update={"precision": "int8"})}
    write_manifest(bundle.root, bundle.manifest.model_copy(update={"files": files, "engines": engines}))
    keep_check(bundle, "ort-cpu-fp32", record, result())
    assert read_manifest(bundle.root).engines["ort-cpu-fp32"].check == result()
    assert read_manifest(bundle.root).engines["ort-cpu-int8"].check is None


def test_a_pass_is_kept_only_if_it_proves_something(recorded_bundle: Callable[[str], Path]):
    levels = tuple(LevelRecord(name=name, passed=True, seconds=1.0) for name in LEVELS if name != "questions")
    passed = result().model_copy(update={"passed": True, "levels": levels})
    context = context_of(recorded_bundle(PAIR), PAIR)
    enough = replace(context, options=replace(context.options, new_tokens=16))
    assert why_not_kept(enough, passed) is None
    few = replace(context, options=replace(context.options, new_tokens=15))
    assert "at least 16 tokens" in str(why_not_kept(few, passed))
    one_id = CalibrationPrompt(input_ids=(5,))
    assert "a prompt was fused" in str(why_not_kept(replace(enough, prompts=[one_id]), passed))
    assert why_not_kept(replace(enough, prompts=[one_id, *PROMPTS]), passed) is None
    part = passed.model_copy(update={"levels": levels[1:]})
    assert "when sources ran too" in str(why_not_kept(enough, part))
    # a failure is one, however little was asked
    assert why_not_kept(replace(few, prompts=[one_id]), result()) is None
