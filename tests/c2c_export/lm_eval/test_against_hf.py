"""The receiver alone, in the harness, answers what the harness's own transformers model answers."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval_runs import answers, be_local, evaluate, requests

GOLDEN = Path(__file__).parents[2] / "golden"
UNALIGNED, ALIGNED = "qwen3_from_qwen2", "llama_from_gemma3_aligned"
TASKS = ("capitals_choice", "capitals_answer", "capitals_text")
TOLERANCE = 2e-3
"""Of the sum over up to 256 tokens."""

each_kind = pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (UNALIGNED, ALIGNED)]
)


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    be_local(monkeypatch, tmp_path)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(num_threads)


@cache
def trained(pair: str) -> HFLM:
    receiver = str(GOLDEN / pair / "receiver")
    return HFLM(pretrained=receiver, dtype="float32", max_length=256, device="cpu", batch_size=1)


def assert_equal(pair: str, bundle: Path, tasks: tuple[str, ...], **options: Any) -> None:
    alone = evaluate("c2c", {"bundle": str(bundle), "fuse": False}, *tasks, **options)
    expected = evaluate(trained(pair), None, *tasks, **options)
    for task in tasks:
        found_answers, expected_answers = answers(alone, task), answers(expected, task)
        assert len(found_answers) == len(expected_answers) >= 4
        assert requests(alone, task) == requests(expected, task)
        if task.endswith("choice"):
            assert [greedy for _, greedy in found_answers] == [greedy for _, greedy in expected_answers]
            found_answers, expected_answers = ([value for value, _ in a] for a in (found_answers, expected_answers))
        if task.endswith("answer"):
            assert found_answers == expected_answers
            assert any(found_answers)
        else:
            np.testing.assert_allclose(found_answers, expected_answers, rtol=0, atol=TOLERANCE)


@each_kind
def test_receiver_alone_answers_as_transformers(pair: str, recorded_bundle: Callable[[str], Path]):
    assert_equal(pair, recorded_bundle(pair), TASKS)


@each_kind
def test_contexts_that_exceed_the_capacity_are_cut_alike(
    pair: str, recorded_bundle: Callable[[str], Path], caplog: pytest.LogCaptureFixture
):
    long = "Answer the question as well as you can, please. " * 16
    assert_equal(pair, recorded_bundle(pair), TASKS[:2], num_fewshot=2, system_instruction=long)
    assert "12 contexts exceed the bundle's capacity of 256 tokens" in caplog.text
    assert "4 contexts exceed the bundle's capacity of 256 tokens" in caplog.text
