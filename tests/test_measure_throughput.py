"""`scripts/measure_throughput.py` counts tokens of requests that generate at the same time."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAIR = "qwen3_from_llama_aligned"

pytestmark = pytest.mark.xdist_group(PAIR)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "measure_throughput.py", *arguments]
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)


def test_rates_of_one_request_and_of_several_are_told(recorded_bundle: Callable[[str], Path]):
    options = ("--prompt-tokens", 16, "--active", 3, "--new-tokens", 40, "--repeats", 2)
    done = run(recorded_bundle(PAIR), *options)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [(result["prompt_tokens"], result["active"]) for result in results] == [(16, 1), (16, 3)]
    assert all(result["tokens_per_second"] > 0 for result in results)
    assert results[0]["times_one"] == 1


def test_a_request_that_cannot_be_served_is_an_error(recorded_bundle: Callable[[str], Path]):
    done = run(recorded_bundle(PAIR), "--prompt-tokens", 100_000, "--repeats", 1)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the prompt takes 100000 tokens")
    assert "Traceback" not in done.stderr
