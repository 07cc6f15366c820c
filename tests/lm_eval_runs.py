"""Runs of lm-evaluation-harness in this process, over the local tasks in lm_eval_tasks, without the network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import pytest
from lm_eval.tasks import TaskManager

import c2c_export.lm_eval  # noqa: F401 (registers the model)

TASKS = Path(__file__).parent / "lm_eval_tasks"


def be_local(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep what the harness writes in `folder`, and off the network. The tasks name their data relative to theirs."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(folder / "requests"))
    # It starts pip and other programs, for seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def evaluate(model: Any, model_args: Mapping[str, Any] | None, *tasks: str, **options: Any) -> dict[str, Any]:
    """The harness's results: `results`, `samples` (answers in `resps`, by `doc_id`) and `config`."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=None if model_args is None else {"num_threads": 1, "allow_unchecked": True, **model_args},
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    return found


def answers(found: Mapping[str, Any], task: str) -> list[Any]:
    """What the model answered, by document and request: texts, (log-likelihood, is greedy), or log-likelihoods."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [response[0] for sample in samples for response in sample["resps"]]


def requests(found: Mapping[str, Any], task: str) -> list[tuple[Any, ...]]:
    """The arguments of every request, likewise."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [arguments for sample in samples for arguments in sample["arguments"]]
