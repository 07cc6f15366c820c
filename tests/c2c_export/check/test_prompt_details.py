"""What the report tells of a prompt agrees with what the level `logits` judges."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checked_bundles import PROMPTS, context_of

from c2c_export.check.both_sides import prefill_both
from c2c_export.check.levels.logits import tie
from c2c_export.check.prompt_details import describe_prompt

PAIR = "qwen3_from_qwen2"


@pytest.mark.xdist_group(PAIR)
def test_tokens_that_float_rounding_may_swap_agree(recorded_bundle: Callable[[str], Path]):
    context = context_of(recorded_bundle(PAIR), PAIR)
    both = prefill_both(context, PROMPTS[0])
    trained = both.trained.logits.copy()
    ranked = np.argsort(-trained)
    for better, worse in ((ranked[0], ranked[1]), (ranked[4], ranked[5])):
        trained[worse] = trained[better] - np.float32(0.3 * tie(trained))
    engine = trained.copy()
    for better, worse in ((ranked[0], ranked[1]), (ranked[4], ranked[5])):
        engine[[better, worse]] = trained[[worse, better]]
    key = next(iter(key for key, kept in context.trained.answers._prompts.items() if kept is both.trained))
    kept = context.trained.answers._prompts
    kept[key] = dataclasses.replace(both.trained, logits=trained)
    context.engine._prompts[PROMPTS[0]] = dataclasses.replace(both.engine, logits=engine)
    try:
        details = describe_prompt(context, PROMPTS[0])
    finally:
        kept[key] = both.trained
    assert details.trained_top5[0].token_id != details.engine_top5[0].token_id
    assert details.top1_equal
    assert details.top5_shared == 5
