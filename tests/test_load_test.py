"""`scripts/load_test.py` passes a server that answers right, and fails one that does not, or that grows."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "load_test.py"
PAIR = "qwen3_from_llama_aligned"
FEW = ("--requests", "24", "--at-once", "6", "--slots", "3", "--rounds", "3")

pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture(scope="module")
def load_test() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load_test"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_server_that_answers_right_passes(
    load_test: ModuleType, recorded_bundle: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    status = load_test.main([str(recorded_bundle(PAIR)), *FEW, "--json", str(tmp_path / "found.json")])
    assert status == 0, capsys.readouterr().out
    rounds = json.loads((tmp_path / "found.json").read_text())
    assert [one["finished"] + one["left"] for one in rounds] == [24] * 3
    assert all(one["finished"] >= 22 and one["generated_tokens"] > 0 for one in rounds)


def test_another_answer_than_expected_fails_and_is_named(
    load_test: ModuleType,
    recorded_bundle: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    alone = load_test.answer_alone

    def wrong(pipe: Any, cases: list[Any]) -> dict[Any, str]:
        return alone(pipe, cases) | {cases[0]: "something else"}

    monkeypatch.setattr(load_test, "answer_alone", wrong)
    assert load_test.main([str(recorded_bundle(PAIR)), "--requests", "4", "--slots", "2"]) == 1
    told = capsys.readouterr().out
    assert "round 1: request 0: " in told
    assert "is not 'something else', as alone" in told


def test_what_grows_from_round_to_round_is_a_problem(load_test: ModuleType):
    def rounds(*resident: float, threads: int = 9) -> list[Any]:
        found = [load_test.Round(resident_mb=megabytes, threads=9, open_files=12) for megabytes in resident]
        found[-1].threads = threads
        return found

    assert not load_test.problems_of(rounds(100, 200, 205.9))
    assert not load_test.problems_of(rounds(100, 200)), "caches are being filled"
    [grown] = load_test.problems_of(rounds(100, 200, 200, 206.1))
    assert grown == "resident memory grew from 200 MB (round 2) to 206 MB"
    pool = load_test.THREAD_POOL
    assert not load_test.problems_of(rounds(100, 100, threads=9 + pool)), "asyncio starts its threads as it needs them"
    assert load_test.problems_of(rounds(100, 100, threads=10 + pool)) == [f"threads grew from 9 to {10 + pool}"]
