"""Faults of the user and of the machine during a check: told as such, and no engine is condemned for them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import RunCli
from recorded_cases import GOLDEN
from safetensors.numpy import load_file, save_file

from c2c_export.bundle import Bundle, EngineRecord, read_manifest, write_manifest
from c2c_export.check import run, run_levels, selection
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.machine_failure import machine_failure
from c2c_export.check.run_levels import RUN
from c2c_export.check_record import Divergence
from c2c_export.errors import C2CError, UsageError

PAIR = "qwen3_from_qwen2"
ENGINE = "ort-cpu-fp32"
OTHERS = ["--sharer", GOLDEN / PAIR / "sharer", "--fuser", GOLDEN / PAIR / "fuser", "--threads", "1"]
ARGUMENTS = ["--receiver", GOLDEN / PAIR / "receiver", *OTHERS]
pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture
def bundle(recorded_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy with two engines of the same files, that were never checked; the second in name only."""
    copy = tmp_path / "pair.bundle"
    shutil.copytree(recorded_bundle(PAIR), copy)
    manifest = read_manifest(copy)
    first = manifest.engines[ENGINE].model_copy(update={"check": None})
    second = first.model_copy(update={"precision": "int8"})
    write_manifest(copy, manifest.model_copy(update={"engines": {ENGINE: first, "ort-cpu-int8": second}}))
    return copy


def raising(error: Exception) -> Callable[[CheckContext], LevelResult]:
    def level(_: CheckContext) -> LevelResult:
        raise error

    return level


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("--questions: question 0: too long"), 2, "--questions: question 0: too long"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (caused(C2CError("a.json: cannot be written"), OSError(30, "Read-only")), 1, "Read-only"),
        (MemoryError(), 1, "there is not enough memory: MemoryError"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 TB"),
            1,
            "can't allocate",
        ),
        (caused(C2CError("graph: broken"), RuntimeError("std::bad_alloc")), 1, "not enough memory: std::bad_alloc"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "not enough memory: CUDA out of memory"),
    ],
)
def test_what_is_no_fault_of_the_engine_is_told_and_leaves_the_manifest(
    run_cli: RunCli, bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, message: str
):
    before = (bundle / "manifest.json").read_bytes()
    monkeypatch.setitem(RUN, "caches", raising(error))
    found, _, err = run_cli("check", bundle, *ARGUMENTS, "--precision", "fp32", "--level", "caches")
    assert found == code
    assert message in err
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_level_that_failed_before_memory_ran_out_is_kept(
    run_cli: RunCli, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(RUN, "sources", lambda _: LevelResult(divergences=[Divergence(message="a gate is flipped")]))
    monkeypatch.setitem(RUN, "caches", raising(MemoryError()))
    code, _, _ = run_cli("check", bundle, *ARGUMENTS, "--precision", "fp32", "--level", "sources", "--level", "caches")
    assert code == 1
    check = read_manifest(bundle).engines[ENGINE].check
    assert check is not None
    assert [level.name for level in check.failed_levels] == ["sources", "caches"]


def test_what_a_damaged_bundle_raises_is_the_engines(tmp_path: Path):
    missing = FileNotFoundError(2, "No such file or directory", str(tmp_path / "graphs" / "weights.data"))
    assert machine_failure(missing, tmp_path) is None
    assert machine_failure(missing, tmp_path / "other") is not None
    assert machine_failure(OSError("Can't load tokenizer"), tmp_path) is None
    assert machine_failure(C2CError("the graph does not load"), tmp_path) is None
    assert machine_failure(IndexError("list index out of range"), tmp_path) is None


def test_a_folder_for_results_that_cannot_be_made_is_refused_before_anything_runs(
    run_cli: RunCli, bundle: Path, tmp_path: Path
):
    (tmp_path / "file").touch()
    code, _, err = run_cli("check", bundle, *ARGUMENTS, "--save-results", tmp_path / "file" / "results")
    assert code == 2
    assert f"--save-results {tmp_path / 'file' / 'results'}: Not a directory; expected a folder" in err
    assert "Reading the bundle" not in err


def damaged_receiver(folder: Path) -> Path:
    """The receiver with one weight another."""
    copy = folder / "receiver"
    shutil.copytree(GOLDEN / PAIR / "receiver", copy)
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file({**weights, name: np.ascontiguousarray(weights[name] * 2)}, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("levels", [["sources", "weights"], ["weights"]])
def test_other_sources_than_the_exports_say_nothing_about_the_engine(
    run_cli: RunCli, bundle: Path, tmp_path: Path, levels: list[str]
):
    before = (bundle / "manifest.json").read_bytes()
    asked = [argument for level in levels for argument in ("--level", level)]
    receiver = ["--receiver", damaged_receiver(tmp_path)]
    code, _, err = run_cli("check", bundle, *receiver, *OTHERS, "--precision", "fp32", *asked)
    assert code == 1
    assert "other sources were given than the bundle was exported from" in err
    assert "model.safetensors is another file" in err
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_readme_beside_the_model_is_no_other_source(run_cli: RunCli, bundle: Path, tmp_path: Path):
    copy = tmp_path / "receiver"
    shutil.copytree(GOLDEN / PAIR / "receiver", copy)
    (copy / "README.md").write_text("# Changed")
    arguments = ["--receiver", copy, *OTHERS, "--precision", "fp32", "--level", "sources"]
    assert run_cli("check", bundle, *arguments)[0] == 0


def test_an_engine_that_cannot_be_checked_leaves_the_others_their_results(
    run_cli: RunCli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def level(context: CheckContext) -> LevelResult:
        if context.record.precision == "int8":
            raise MemoryError
        return LevelResult(divergences=[Divergence(message="it is wrong")])

    monkeypatch.setitem(RUN, "weights", level)
    code, out, err = run_cli("check", bundle, *ARGUMENTS, "--level", "weights", "--json", tmp_path / "report.json")
    assert code == 1
    assert "ort-cpu-fp32 against the trained models" in out
    assert "ort-cpu-int8 could not be checked: there is not enough memory" in err
    engines = read_manifest(bundle).engines
    assert engines[ENGINE].check is not None
    assert engines["ort-cpu-int8"].check is None
    written = json.loads((tmp_path / "report.json").read_bytes())
    assert [engine["engine"] for engine in written["engines"]] == [ENGINE]
    assert "ort-cpu-int8 could not be checked" in written["problems"][0]


def test_an_engine_that_cannot_run_here_is_listed_beside_those_that_were_checked(
    run_cli: RunCli, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    def obstacle(_: Bundle, record: EngineRecord) -> str | None:
        return "it needs an NVIDIA GPU" if record.precision == "int8" else None

    monkeypatch.setattr(selection, "why_not_here", obstacle)
    code, out, err = run_cli("check", bundle, *ARGUMENTS, "--level", "sources")
    assert "ort-cpu-fp32 against the trained models" in out
    assert "passed" in out
    assert "ort-cpu-int8 was not checked: it needs an NVIDIA GPU" in err
    assert code == 1


def test_a_report_that_cannot_be_written_loses_no_result(
    run_cli: RunCli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_html", fail)
    monkeypatch.setitem(RUN, "weights", raising(IndexError("broken")))
    files = ["--report", tmp_path / "report.html", "--json", tmp_path / "report.json"]
    code, _, err = run_cli("check", bundle, *ARGUMENTS, "--precision", "fp32", "--level", "weights", *files)
    assert code == 1
    assert "report.html: cannot be written: [Errno 28] No space left on device" in err
    assert (tmp_path / "report.json").is_file()
    assert read_manifest(bundle).engines[ENGINE].check is not None


def test_a_prompt_that_cannot_be_described_loses_no_result(
    run_cli: RunCli, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise KeyError("token")

    monkeypatch.setattr(run_levels, "_details", fail)
    code, out, err = run_cli("check", bundle, *ARGUMENTS, "--precision", "fp32", "--level", "sources")
    assert "ort-cpu-fp32 against the trained models" in out
    assert "the prompts cannot be described: KeyError: 'token'" in err
    assert code == 1
