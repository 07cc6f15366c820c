"""The level `generation`: near ties are excused, other tokens and other stop tokens are not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checked_bundles import PROMPTS, context_of
from recorded_pairs import each_pair

from c2c_export.check.both_sides import BothGenerations, generate_both
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.levels.generation import check_generation, gap_at_the_first_difference
from c2c_export.check.trained.answer import TrainedGeneration
from runtime import Generation, Timings

BundleOf = Callable[[str], Path]
PAIR = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(PAIR)


def both(trained: list[int], engine: list[int], *logits: list[float]) -> BothGenerations:
    rows = tuple(np.array(row, dtype=np.float32) for row in logits)
    timings = Timings(0.0, 0.0, 0.0, 0.0, 0.0)
    return BothGenerations(TrainedGeneration(tuple(trained), rows), Generation("", engine, "length", timings))


def test_the_gap_is_that_of_the_trained_logits_where_the_answers_part():
    sides = both([1, 2, 0], [1, 0, 0], [0, 9, 0], [3.0, 1.0, 4.0], [9, 0, 0])
    assert sides.common_prefix == 1
    assert gap_at_the_first_difference(sides) == pytest.approx(1.0 / np.std([3.0, 1.0, 4.0]))


def test_equal_answers_have_no_gap():
    sides = both([1, 2], [1, 2], [0, 9, 0], [0, 0, 9])
    assert sides.common_prefix == 2
    assert gap_at_the_first_difference(sides) == 0


@each_pair
def test_the_exported_engine_answers_as_the_trained_models_do(pair: str, recorded_bundle: BundleOf):
    result = check_generation(context_of(recorded_bundle(pair), pair))
    assert result.passed
    assert {m.name: m.value for m in result.measurements} == {"common prefix": 1, "gap at the first difference": 0}


@pytest.fixture
def context(recorded_bundle: BundleOf) -> CheckContext:
    return context_of(recorded_bundle(PAIR), PAIR)


def with_engine_tokens(context: CheckContext, change: Callable[[list[int]], list[int]]) -> LevelResult:
    generate = context.engine.generate

    def generate_and_change(prompt, new_tokens):
        found = generate(prompt, new_tokens)
        return dataclasses.replace(found, token_ids=change(found.token_ids)) if prompt is PROMPTS[0] else found

    context.engine.generate = generate_and_change  # type: ignore[method-assign]
    return check_generation(context)


def test_another_token_is_named(context: CheckContext):
    right = generate_both(context, PROMPTS[0]).trained
    worst = int(right.logits[4].argmin())
    result = with_engine_tokens(context, lambda ids: [*ids[:4], worst, *ids[5:]])
    assert not result.passed
    message = result.divergences[0].message
    assert f"new token 4 is {worst} " in message
    assert f"expected {right.token_ids[4]} " in message


def test_a_near_tie_is_excused(context: CheckContext, monkeypatch: pytest.MonkeyPatch):
    right = generate_both(context, PROMPTS[0]).trained
    second = int(np.argsort(right.logits[4])[-2])
    near = right.logits[4].copy()
    near[second] = near[right.token_ids[4]] - 1e-5
    tied = dataclasses.replace(right, logits=(*right.logits[:4], near, *right.logits[5:]))
    answers = context.trained.answers
    generate = answers.generate

    def generate_tied(plan, *rest):
        found = generate(plan, *rest)
        return tied if found is right else found

    monkeypatch.setattr(answers, "generate", generate_tied)
    result = with_engine_tokens(context, lambda ids: [*ids[:4], second, *ids[5:]])
    assert result.passed
    assert {m.name: m.value for m in result.measurements}["common prefix"] == pytest.approx((4 / 12 + 1) / 2)


def test_stopping_elsewhere_is_named(context: CheckContext):
    result = with_engine_tokens(context, lambda ids: ids[:7])
    assert not result.passed
    assert "the trained model goes on, the other stops; the stop tokens differ" in result.divergences[0].message
