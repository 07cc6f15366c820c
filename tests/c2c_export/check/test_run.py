"""The check as a whole, by the command line: exit status, what is printed and written, and what the manifest keeps."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from command_line import RunCli
from recorded_cases import GOLDEN

from c2c_export.bundle import Bundle, EngineRecord, read_manifest, sha256_of, write_manifest
from c2c_export.check.report import CheckReport
from c2c_export.check.run_levels import RUN

ROOT = Path(__file__).parents[3]
PAIR = "qwen3_from_qwen2"
SOURCES = [
    *("--receiver", GOLDEN / PAIR / "receiver"),
    *("--sharer", GOLDEN / PAIR / "sharer"),
    *("--fuser", GOLDEN / PAIR / "fuser"),
]
FAST = ["--threads", "1", "--new-tokens", "16"]
pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "Which country is the city of Lyon in?"}]}\n'
        '{"input_ids": [5, 6, 7, 8, 9, 10]}\n'
    )
    return path


@pytest.fixture
def bundle(recorded_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy with its engine in fp32 alone, that was never checked."""
    copy = tmp_path / "pair.bundle"
    shutil.copytree(recorded_bundle(PAIR), copy)
    manifest = read_manifest(copy)
    for name in manifest.engines.keys() - {"ort-cpu-fp32"}:
        manifest = manifest.without_engine(name)
    engines = {name: record.model_copy(update={"check": None}) for name, record in manifest.engines.items()}
    write_manifest(copy, manifest.model_copy(update={"engines": engines}))
    return copy


def record_of(bundle: Path, engine: str = "ort-cpu-fp32") -> EngineRecord:
    return read_manifest(bundle).engines[engine]


def break_the_last_norm(bundle: Path) -> None:
    """Give the last norm of the engine's receiver another epsilon, and make the manifest's hashes right again."""
    manifest = read_manifest(bundle)
    name = manifest.engines["ort-cpu-fp32"].graphs["receiver"]
    model = onnx.load(bundle / name, load_external_data=False)
    norm = [node for node in model.graph.node if node.op_type == "RMSNormalization"][-1]
    (epsilon,) = (attribute for attribute in norm.attribute if attribute.name == "epsilon")
    epsilon.f = 0.5
    (bundle / name).write_bytes(model.SerializeToString())
    files = {**manifest.files, name: sha256_of(bundle / name)}
    write_manifest(bundle, manifest.model_copy(update={"files": files}))


def test_an_engine_that_passes_exits_0_and_the_result_survives_in_the_manifest(
    run_cli: RunCli, bundle: Path, prompts: Path, tmp_path: Path
):
    before = read_manifest(bundle)
    written = ["--json", tmp_path / "report.json", "--report", tmp_path / "report.html"]
    code, out, err = run_cli("check", bundle, *SOURCES, *FAST, "--prompts", prompts, *written)
    assert code == 0, err
    assert "ort-cpu-fp32 against the trained models, 2 prompts: passed" in out
    for level in ("sources", "weights", "graphs", "caches", "logits", "generation"):
        assert level in out
    check = record_of(bundle).check
    assert check is not None
    assert check.passed
    assert check.calibration == sha256_of(prompts)
    assert [level.name for level in check.levels] == [
        *("sources", "weights", "graphs"),
        *("caches", "logits", "generation"),
    ]
    assert all(m.at_most is not None or m.at_least is not None for m in check.levels[3].measurements)
    # nothing else of the bundle changed
    after = read_manifest(bundle)
    unchecked = {name: record.model_copy(update={"check": None}) for name, record in after.engines.items()}
    assert after.model_copy(update={"engines": unchecked}) == before
    Bundle.open(bundle)
    report = CheckReport.model_validate_json((tmp_path / "report.json").read_bytes())
    assert report.passed
    assert report.engines[0].check == check
    assert len(report.engines[0].prompts) == 2
    assert "<html" in (tmp_path / "report.html").read_text()


def test_an_engine_that_fails_exits_1_and_is_refused_until_that_is_allowed(
    run_cli: RunCli, bundle: Path, prompts: Path
):
    break_the_last_norm(bundle)
    code, out, _ = run_cli("check", bundle, *SOURCES, *FAST, "--prompts", prompts)
    assert code == 1
    assert "ort-cpu-fp32 against the trained models, 2 prompts: FAILED" in out
    check = record_of(bundle).check
    assert check is not None
    assert not check.passed
    failed = {level.name for level in check.failed_levels}
    assert {"weights", "logits"} <= failed
    assert "caches" not in failed
    code, _, err = run_cli("generate", bundle, "-p", "Hi", "--max-new-tokens", "2")
    assert code == 1
    assert "failed its check at level weights" in err
    code, _, err = run_cli("generate", bundle, "-p", "Hi", "--max-new-tokens", "2", "--allow-failed")
    assert code == 0, err


def test_a_pass_of_some_levels_only_is_not_kept(run_cli: RunCli, bundle: Path, prompts: Path):
    code, out, err = run_cli("check", bundle, *SOURCES, *FAST, "--prompts", prompts, "--level", "logits")
    assert code == 0, err
    assert "Not kept in the manifest" in out
    assert record_of(bundle).check is None


def test_a_failure_of_some_levels_only_is_kept(run_cli: RunCli, bundle: Path, prompts: Path):
    break_the_last_norm(bundle)
    assert run_cli("check", bundle, *SOURCES, *FAST, "--prompts", prompts, "--level", "logits")[0] == 1
    check = record_of(bundle).check
    assert check is not None
    assert [level.name for level in check.levels] == ["logits"]


def test_a_build_of_another_engine_keeps_the_result_and_a_rebuild_drops_it(
    run_cli: RunCli, bundle: Path, prompts: Path
):
    assert run_cli("check", bundle, *SOURCES, *FAST, "--prompts", prompts)[0] == 0
    assert run_cli("build", bundle, "--engine", "ort-cpu", "--precision", "int8")[0] == 0
    assert record_of(bundle).check is not None
    assert record_of(bundle, "ort-cpu-int8").check is None
    code, out, err = run_cli("check", bundle, *SOURCES, *FAST, "--prompts", prompts, "--precision", "int8")
    assert code == 0, err
    assert "ort-cpu-int8 against" in out
    assert "ort-cpu-fp32 against" not in out
    assert record_of(bundle, "ort-cpu-int8").check is not None
    assert run_cli("build", bundle, "--engine", "ort-cpu", "--rebuild")[0] == 0
    assert record_of(bundle).check is None
    assert record_of(bundle, "ort-cpu-int8").check is not None


def test_a_level_that_cannot_be_run_has_failed_and_says_why(
    run_cli: RunCli, bundle: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(_: Any) -> Any:
        raise IndexError("list index out of range")

    monkeypatch.setitem(RUN, "caches", fail)
    code, out, _ = run_cli("check", bundle, *SOURCES, *FAST, "--prompts", prompts, "--level", "caches")
    assert code == 1
    assert "caches: the level could not be run: IndexError: list index out of range" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "sharpness"], "--level sharpness: expected one of sources, weights"),
        (["--level", "questions"], "--level questions: expected a file of questions"),
        (["--new-tokens", "0"], "--new-tokens 0: expected at least 1"),
        (["--engine", "ort-cpu", "--precision", "int4"], "has no ort-cpu in int4"),
        (["--sharer", "a", "--sharer", "b"], "2 --sharer given, expected 1"),
        (["--fuser", "a", "--fuser", "b"], "2 --fuser given, expected 1"),
        (["--prompts", "none.jsonl"], "none.jsonl: No such file or directory"),
        (
            ["--json", "no/such/folder/report.json"],
            "--json no/such/folder/report.json: expected the name of a file in a folder that exists",
        ),
    ],
)
def test_a_wrong_use_exits_2_and_leaves_the_manifest(run_cli: RunCli, bundle: Path, arguments: list[str], message: str):
    before = (bundle / "manifest.json").read_bytes()
    code, _, err = run_cli("check", bundle, *arguments)
    assert code == 2
    assert message in err
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_prompt_that_does_not_fit_is_named(run_cli: RunCli, bundle: Path, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input_ids": [1, 2, 3]}\n' + json.dumps({"input_ids": [1] * 300}) + "\n")
    code, _, err = run_cli("check", bundle, *SOURCES, *FAST, "--prompts", path)
    assert code == 2
    assert "prompt 1 (1 1 1" in err
    assert "the prompt takes 300 tokens, this bundle's capacity is 256" in err


def test_a_source_that_is_gone_is_named_with_its_field_and_option(run_cli: RunCli, bundle: Path):
    manifest = read_manifest(bundle)
    receiver = manifest.receiver.model_copy(update={"source": "/gone/receiver"})
    write_manifest(bundle, manifest.model_copy(update={"receiver": receiver}))
    code, _, err = run_cli("check", bundle, *SOURCES[2:], *FAST)
    assert code == 1
    assert "manifest.json: field receiver.source names /gone/receiver, which cannot be read" in err
    assert "with --receiver" in err


def test_an_interrupt_leaves_the_manifest_as_it_was(bundle: Path, prompts: Path):
    before = (bundle / "manifest.json").read_bytes()
    arguments = [str(argument) for argument in (bundle, *SOURCES, "--prompts", prompts, "--new-tokens", 200)]
    process = subprocess.Popen(
        [sys.executable, "-m", "c2c_export.cli", "check", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("ort-cpu-fp32: caches"):  # it has results, and goes on for a while
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "Traceback" not in rest
    assert (bundle / "manifest.json").read_bytes() == before
