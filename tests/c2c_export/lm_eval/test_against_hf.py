"""The receiver alone, in the harness, answers what the harness's own transformers model answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval_runs import answers, be_local, evaluate
from recorded_pairs import each_pair

GOLDEN = Path(__file__).parents[2] / "golden"
TOLERANCE = 2e-3


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_local(monkeypatch, tmp_path)


def both(pair: str, bundle: Path, task: str, hf_args: dict[str, Any] | None = None, **options: Any) -> list[list[Any]]:
    alone = evaluate("c2c", {"bundle": str(bundle), "fuse": False, "num_threads": 1}, task, **options)
    arguments = {"pretrained": str(GOLDEN / pair / "receiver"), "dtype": "float32", "max_length": 256}
    trained = evaluate("hf", {**arguments, **(hf_args or {})}, task, device="cpu", batch_size=1, **options)
    found, expected = answers(alone, task), answers(trained, task)
    assert len(found) == len(expected) > 1
    assert alone["results"][task].keys() == trained["results"][task].keys()
    return [found, expected]


@each_pair
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_choices_are_as_likely(pair: str, num_fewshot: int, recorded_bundle: Callable[[str], Path]):
    found, expected = both(pair, recorded_bundle(pair), "capitals_choice", num_fewshot=num_fewshot)
    assert len(found) == 12
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=0, atol=TOLERANCE)


@each_pair
def test_answers_are_the_same(pair: str, recorded_bundle: Callable[[str], Path]):
    found, expected = both(pair, recorded_bundle(pair), "capitals_answer")
    assert found == expected
    assert any(found)


@each_pair
def test_texts_are_as_likely(pair: str, recorded_bundle: Callable[[str], Path]):
    found, expected = both(pair, recorded_bundle(pair), "capitals_text")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.xdist_group("qwen3_from_qwen2")
@pytest.mark.parametrize("task", ["capitals_choice", "capitals_answer"])
def test_contexts_that_exceed_the_capacity_are_cut_alike(
    task: str, recorded_bundle: Callable[[str], Path], caplog: pytest.LogCaptureFixture
):
    # Eight examples of some sixty tokens each.
    found, expected = both(
        "qwen3_from_qwen2",
        recorded_bundle("qwen3_from_qwen2"),
        task,
        num_fewshot=3,
        system_instruction="Answer the question as well as you can, please. " * 8,
    )
    if task == "capitals_answer":
        assert found == expected
    else:
        np.testing.assert_allclose(
            [value for value, _ in found], [value for value, _ in expected], rtol=0, atol=TOLERANCE
        )
    assert "capacity of 256 tokens" in caplog.text
