"""The real demo pair against the reference on 12 prompts (tests/demo_pair/README.md), and against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from c2c_export.sources import resolve_model
from runtime import C2CPipeline

pytestmark = pytest.mark.xdist_group("demo")

RECORDED = json.loads((Path(__file__).parent / "demo_pair" / "expected.json").read_text())
NUM_TOKENS = 32
# The recorded logits are rounded to four decimals and lie around 20.
TOP5_TOLERANCE = 1e-3

every_prompt = pytest.mark.parametrize("recorded", RECORDED, ids=range(len(RECORDED)))


@pytest.fixture(scope="module")
def pipe(demo_bundle: Path) -> C2CPipeline:
    return C2CPipeline.from_bundle(demo_bundle, num_slots=1)


def test_twelve_prompts_were_recorded():
    assert len(RECORDED) == 12
    assert {len(recorded["generated"]) for recorded in RECORDED} == {NUM_TOKENS}


@every_prompt
def test_prompt_is_read_fused_and_continued_as_recorded(recorded: dict[str, Any], pipe: C2CPipeline):
    with pipe.prefill(recorded["messages"]) as session:
        plan = session.plan
        assert [[s.stop - s.start, 1 if s.fused else -1] for s in plan.sections] == recorded["sections"]
        for tokens, model in ((plan.receiver, "receiver"), (plan.sharers[0], "sharer")):
            real = ~np.array(recorded[f"{model}_padding_mask"])
            assert tokens.ids.tolist() == np.array(recorded[f"{model}_ids"])[real].tolist()
            assert tokens.position_ids.tolist() == np.flatnonzero(real).tolist()
        assert (plan.closing_padding_id is not None) == recorded["receiver_padding_mask"][-1]

        top_ids, top_logits = recorded["top5"]
        assert np.argsort(-session.logits)[:5].tolist() == top_ids
        np.testing.assert_allclose(session.logits[top_ids], top_logits, rtol=TOP5_TOLERANCE)

        out = session.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    assert out.token_ids == recorded["generated"]


@every_prompt
def test_text_up_to_the_stop_is_the_recorded_one(recorded: dict[str, Any], pipe: C2CPipeline):
    out = pipe.generate(recorded["messages"], max_new_tokens=NUM_TOKENS)
    assert out.text == recorded["text"]
    generated, stop_ids = recorded["generated"], pipe.bundle.manifest.stop_ids
    stops = [index for index, token in enumerate(generated) if token in stop_ids]
    assert out.token_ids == generated[: stops[0] + 1 if stops else NUM_TOKENS]
    assert out.finish_reason == ("stop" if stops else "length")


@pytest.mark.parametrize("index", [0, 6, 9])
def test_receiver_alone_equals_transformers(index: int, pipe: C2CPipeline, receiver: tuple[Any, Any]):
    model, tokenizer = receiver
    messages = RECORDED[index]["messages"]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS)
    expected = generated[0, ids.shape[1] :].tolist()

    with pipe.prefill(messages, fuse=False) as session:
        assert session.token_ids.tolist() == ids[0].tolist()
        assert session.position_ids.tolist() == list(range(ids.shape[1]))
        out = session.generate(max_new_tokens=NUM_TOKENS)
    assert out.token_ids == expected
    assert out.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.fixture(scope="module")
def receiver(demo_models: Path) -> tuple[Any, Any]:
    folder = resolve_model(str(demo_models / "smollm2.gguf"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)
