"""The levels of the whole engine in int8 and int4: good engines pass, and no fault of composition hides in rounding."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checked_pairs import FindPair
from recorded_pairs import each_pair

from c2c_export.check.engine import CheckedEngine, EnginePrompt
from c2c_export.check.level import CheckContext
from c2c_export.check.levels.caches import check_caches
from c2c_export.check.levels.generation import check_generation
from c2c_export.check.levels.logits import check_logits
from c2c_export.check.prompts import read_calibration

PAIR, SEQUENTIAL = "qwen3_from_qwen2", "two_sharers_sequential"
LEVELS = (check_caches, check_logits, check_generation)
Change = Callable[[CheckContext], None]


def context_in(pair: str, precision: str, checked_pair: FindPair, num_prompts: int = 2) -> CheckContext:
    checked = checked_pair(pair)
    context = checked.context(checked.bundle, f"ort-cpu-{precision}")
    options = dataclasses.replace(context.options, new_tokens=12)
    return dataclasses.replace(context, options=options, prompts=read_calibration(None).prompts[:num_prompts])


def with_prompts(change: Callable[[CheckContext, EnginePrompt], EnginePrompt]) -> Change:
    """Change what the engine gives for every prompt."""

    def apply(context: CheckContext) -> None:
        prefill = context.engine.prefill
        context.engine.prefill = lambda prompt: change(context, prefill(prompt))  # type: ignore[method-assign]

    return apply


def zero_caches(context: CheckContext, found: EnginePrompt) -> EnginePrompt:
    keys, values = ([np.zeros_like(cache) for cache in caches] for caches in (found.keys, found.values))
    return dataclasses.replace(found, keys=tuple(keys), values=tuple(values))


def rows_off_by_one(context: CheckContext, found: EnginePrompt) -> EnginePrompt:
    keys, values = ([np.roll(cache, 1, axis=1) for cache in caches] for caches in (found.keys, found.values))
    return dataclasses.replace(found, keys=tuple(keys), values=tuple(values))


def other_logits(context: CheckContext) -> None:
    """Each prompt's logits are the next prompt's."""
    prefill, prompts = context.engine.prefill, list(context.prompts)

    def changed(prompt: Any) -> EnginePrompt:
        other = prompts[(prompts.index(prompt) + 1) % len(prompts)]
        return dataclasses.replace(prefill(prompt), logits=prefill(other).logits)

    context.engine.prefill = changed  # type: ignore[method-assign]


def fuse_in_parallel(context: CheckContext) -> None:
    """The engine fuses the other way round than the manifest says: the two torch sides follow the manifest."""
    manifest = context.bundle.manifest
    mode = "sequential" if manifest.fusion_mode == "parallel" else "parallel"
    answers = context.held.answers(context)
    prefill = answers.prefill
    # Seen from the comparison it is the same which of the sides fuses wrongly.
    answers.prefill = lambda plan, _: prefill(plan, mode)  # type: ignore[method-assign]


@each_pair
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_good_engine_is_near_the_modules_that_hold_its_weights(pair: str, precision: str, checked_pair: FindPair):
    context = context_in(pair, precision, checked_pair)
    results = [level(context) for level in LEVELS]
    for result in results:
        assert result.passed, result.divergences
    own = [{m.name: m.value for m in result.measurements if m.name.endswith("own weights")} for result in results]
    assert [len(measured) for measured in own] == [2, 1, 1]
    # With room to the bounds.
    assert own[0]["row error, own weights"] < 0.3
    assert own[0]["relative error, own weights"] < 0.1
    assert own[1]["relative error, own weights"] < 0.5
    assert own[2]["gap of any token, own weights"] < 0.8


@pytest.mark.xdist_group(PAIR)
def test_float32_is_compared_with_the_trained_models_alone(checked_pair: FindPair):
    context = context_in(PAIR, "fp32", checked_pair)
    names = [m.name for level in LEVELS for m in level(context).measurements]
    assert not [name for name in names if name.endswith("own weights")]


@pytest.mark.parametrize(
    ("pair", "level", "change"),
    [
        pytest.param(PAIR, check_caches, with_prompts(zero_caches), id="zero", marks=pytest.mark.xdist_group(PAIR)),
        pytest.param(PAIR, check_caches, with_prompts(rows_off_by_one), id="off", marks=pytest.mark.xdist_group(PAIR)),
        pytest.param(PAIR, check_logits, other_logits, id="logits", marks=pytest.mark.xdist_group(PAIR)),
        pytest.param(
            SEQUENTIAL, check_caches, fuse_in_parallel, id="parallel", marks=pytest.mark.xdist_group(SEQUENTIAL)
        ),
    ],
)
def test_a_fault_of_composition_fails_in_int4(pair: str, level: Any, change: Change, checked_pair: FindPair):
    context = context_in(pair, "int4", checked_pair)
    change(context)
    result = level(context)
    failed = [m.name for m in result.measurements if not m.passed]
    assert [name for name in failed if name.endswith("own weights")]
    assert result.divergences


@pytest.mark.xdist_group(PAIR)
def test_a_step_that_repeats_a_token_fails_in_int4(checked_pair: FindPair, monkeypatch: pytest.MonkeyPatch):
    context = context_in(PAIR, "int4", checked_pair)
    generate = CheckedEngine.generate

    def repeated(self, prompt, new_tokens):
        found = generate(self, prompt, new_tokens)
        return dataclasses.replace(found, token_ids=[found.token_ids[0], *found.token_ids[:-1]])

    monkeypatch.setattr(CheckedEngine, "generate", repeated)
    result = check_generation(context)
    assert "prompt 0 (Which country is the city of Kazan in?): new token" in result.divergences[0].message
    failed = [m.name for m in result.measurements if not m.passed]
    assert failed[-1:] == ["gap of any token, own weights"]


@pytest.mark.xdist_group(PAIR)
def test_the_pair_is_built_once_and_freed_after_the_last_level(checked_pair: FindPair, monkeypatch: pytest.MonkeyPatch):
    context = context_in(PAIR, "int4", checked_pair, num_prompts=1)
    read: list[str] = []
    model = context.engine.model
    context.engine.model = lambda name: read.append(name) or model(name)  # type: ignore[method-assign]
    for level in LEVELS:
        level(context)
    assert sorted(read) == ["fuser0", "receiver", "sharer0"]
    assert context.held._answers is None
