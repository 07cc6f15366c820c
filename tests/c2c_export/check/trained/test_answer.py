"""Cache-to-Cache in torch against every recorded case of the reference: caches, logits, greedy tokens."""

import json
from collections.abc import Callable

import numpy as np
from checked_bundles import trained_pair
from recorded_cases import CACHE_TOLERANCE, GOLDEN, LOGITS_TOLERANCE, Recorded, every_case

from c2c_export.bundle import FusionMode
from c2c_export.checkpoint import read_fuser
from runtime import C2CPipeline
from runtime.messages import parse_messages
from runtime.prompt import Plan

PipelineOf = Callable[[str], C2CPipeline]


def plan_and_mode(case: Recorded, pipe: C2CPipeline) -> tuple[Plan, FusionMode]:
    numbers = tuple(range(case.num_sharers))
    messages = parse_messages(case.messages) if case.messages else None
    plan = pipe.make_plan(messages, [] if messages else case.prompt, numbers)
    return plan, json.loads((GOLDEN / case.folder / "case.json").read_text())["fusion_mode"]


@every_case
def test_fused_caches_and_logits_are_the_recorded_ones(case: Recorded, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(case.folder)
    prompt = trained_pair(pipe.bundle.root, case.folder).answers.prefill(*plan_and_mode(case, pipe))
    real = case.real("receiver")
    assert prompt.rows.position_ids.tolist() == np.flatnonzero(real).tolist()
    for name, layers in (("fused_key", prompt.rows.keys), ("fused_value", prompt.rows.values)):
        for layer, found in enumerate(layers):
            expected = case.array(f"{name}.{layer}")[:, real]
            np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=CACHE_TOLERANCE)
    np.testing.assert_allclose(prompt.logits, case.array("prefill_logits"), rtol=0, atol=LOGITS_TOLERANCE)


@every_case
def test_sixteen_greedy_tokens_are_the_recorded_ones(case: Recorded, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(case.folder)
    answers = trained_pair(pipe.bundle.root, case.folder).answers
    generation = answers.generate(*plan_and_mode(case, pipe), 16, stop_ids=())
    expected = case.array("generated").tolist()
    assert list(generation.token_ids) == expected
    assert [int(logits.argmax()) for logits in generation.logits] == expected


@every_case
def test_a_stop_token_ends_the_continuation_and_is_part_of_it(case: Recorded, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(case.folder)
    answers = trained_pair(pipe.bundle.root, case.folder).answers
    expected = case.array("generated").tolist()
    generation = answers.generate(*plan_and_mode(case, pipe), 16, stop_ids={expected[3]})
    assert list(generation.token_ids) == expected[: expected.index(expected[3]) + 1]


@every_case
def test_every_projector_has_a_mean_weight(case: Recorded, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(case.folder)
    prompt = trained_pair(pipe.bundle.root, case.folder).answers.prefill(*plan_and_mode(case, pipe))
    links = [
        (number, link.receiver_layer)
        for number, folder in enumerate(sorted((GOLDEN / case.folder).glob("fuser*")))
        for link in read_fuser(folder).links
    ]
    assert [(weight.sharer, weight.receiver_layer) for weight in prompt.weights] == links
    assert all(0 < mean < 1 for weight in prompt.weights for mean in (weight.key, weight.value))
