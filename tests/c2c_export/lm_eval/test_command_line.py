"""The harness's command line with our model: `python -m c2c_export.lm_eval`, and the entry point of later versions."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model
from lm_eval_runs import TASKS, answers, be_local, evaluate

from c2c_export.lm_eval.__main__ import main
from c2c_export.lm_eval.model import C2CLanguageModel

UNALIGNED = "qwen3_from_qwen2"
ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.xdist_group(UNALIGNED)


def test_the_command_line_evaluates_a_bundle(
    recorded_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    bundle = recorded_bundle(UNALIGNED)
    command = [sys.executable, "-m", "c2c_export.lm_eval", "--model", "c2c"]
    model_args = f"bundle={bundle},engine=ort-cpu,precision=fp32,fuse=true,sharers=0,allow_unchecked=true"
    command += ["--model_args", model_args]
    command += ["--tasks", "capitals_choice", "--include_path", ".", "--apply_chat_template"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=TASKS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|capitals_choice|" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert (config["engine"], config["sharers"], config["bundle"]) == ("ort-cpu-fp32", [0], str(bundle))
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    be_local(monkeypatch, tmp_path)
    expected = evaluate("c2c", {"bundle": str(bundle)}, "capitals_choice", apply_chat_template=True)
    logged = [float(answer[0][0]) for sample in sorted(found, key=lambda s: s["doc_id"]) for answer in sample["resps"]]
    assert logged == pytest.approx([value for value, _ in answers(expected, "capitals_choice")], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ({"bundle": "nowhere"}, 1, "error: nowhere is not a bundle"),
        ({"bundle": "nowhere", "fused": True}, 2, "error: model_args: unknown argument fused"),
    ],
    ids=str,
)
def test_an_error_is_one_line(
    arguments: dict[str, Any],
    exit_code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    # The harness would index its thousands of tasks first.
    monkeypatch.setattr("c2c_export.lm_eval.__main__.cli_evaluate", lambda: get_model("c2c")(**arguments))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == exit_code
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") <= 2


def test_the_entry_point_names_the_model_that_is_registered():
    (point,) = (point for point in entry_points(group="lm_eval.models") if point.name == "c2c")
    assert point.load() is C2CLanguageModel is get_model("c2c")


def test_the_harness_keeps_its_own_models():
    assert get_model("dummy").__module__ == "lm_eval.models.dummy"
