"""The level `logits`: its measures against numbers worked out by hand, and a pair's engine with wrong logits."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checked_bundles import PROMPTS, context_of
from recorded_pairs import each_pair

from c2c_export.check.level import CheckContext
from c2c_export.check.levels.logits import agreements, check_logits, kl_divergence, tie

BundleOf = Callable[[str], Path]
PAIR = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(PAIR)


def logits(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_kl_divergence_is_that_of_the_two_distributions():
    trained, engine = logits(math.log(0.5), math.log(0.25), math.log(0.25)), logits(0.0, 0.0, 0.0)
    expected = 0.5 * math.log(0.5 * 3) + 2 * 0.25 * math.log(0.25 * 3)
    assert kl_divergence(trained, engine) == pytest.approx(expected, abs=1e-6)
    assert kl_divergence(trained, trained + 7) == pytest.approx(0, abs=1e-6)


def test_agreement_counts_the_five_likeliest_tokens():
    trained = logits(9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    assert agreements(trained, trained) == (True, 1.0)
    assert agreements(trained, logits(8, 9, 7, 6, 5, 4, 3, 2, 1, 0)) == (False, 1.0)
    assert agreements(trained, logits(9, 8, 7, 0, 0, 6, 5, 0, 0, 0)) == (True, 0.6)


def test_tokens_that_float_rounding_may_swap_agree():
    trained = logits(9, 8.9999, 5, 4, 3, 2.9999, 1, 0)
    assert tie(trained) > 1e-4
    assert agreements(trained, logits(8.9999, 9, 5, 4, 2.9999, 3, 1, 0)) == (True, 1.0)


@each_pair
def test_the_exported_engine_is_within_float_rounding_of_the_trained_models(pair: str, recorded_bundle: BundleOf):
    result = check_logits(context_of(recorded_bundle(pair), pair))
    assert result.passed
    values = {measurement.name: measurement.value for measurement in result.measurements}
    assert values["relative error"] < 1e-4
    assert values["top-1 agreement"] == values["top-5 agreement"] == 1


@pytest.fixture
def context(recorded_bundle: BundleOf) -> CheckContext:
    return context_of(recorded_bundle(PAIR), PAIR)


def test_the_prompt_that_is_furthest_off_is_named(context: CheckContext):
    prefill = context.engine.prefill

    def prefill_and_change(prompt):
        found = prefill(prompt)
        return dataclasses.replace(found, logits=found.logits[::-1]) if prompt is PROMPTS[1] else found

    context.engine.prefill = prefill_and_change  # type: ignore[method-assign]
    result = check_logits(context)
    assert not result.passed
    assert "prompt 1 (Name three rivers, one a line.)" in result.divergences[0].message
    failed = {measurement.name for measurement in result.measurements if not measurement.passed}
    assert {"relative error", "KL divergence"} <= failed


def test_a_number_added_to_all_logits_is_no_error(context: CheckContext):
    prefill = context.engine.prefill
    context.engine.prefill = lambda prompt: dataclasses.replace(  # type: ignore[method-assign]
        prefill(prompt), logits=prefill(prompt).logits + np.float32(3)
    )
    assert check_logits(context).passed


def test_what_is_not_a_number_fails(context: CheckContext):
    prefill = context.engine.prefill
    context.engine.prefill = lambda prompt: dataclasses.replace(  # type: ignore[method-assign]
        prefill(prompt), logits=np.full_like(prefill(prompt).logits, np.nan)
    )
    assert not check_logits(context).passed
