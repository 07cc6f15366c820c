"""Scores of continuations: against transformers for the receiver alone, against what C2C itself decodes when fused."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from recorded_pairs import (
    PipelineOf,
    each_pair,
    every_kind,
    tokenizer_of,
    unaligned,
)
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from runtime import C2CError, C2CPipeline, Session, UsageError
from runtime.score import score_tokens

QUESTION = {"role": "user", "content": "What is the capital of France?"}
FOLLOW_UP = {"role": "user", "content": "And of Spain?"}
IDS = [5, 77, 300, 12, 511, 8, 64, 9, 250, 33, 401]
OTHER_IDS = [17, 3, 499, 60, 61, 2, 128]
GREEDY = {"ignore_eos": True}
TOLERANCE = 1e-4


@cache
def model_of(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        GOLDEN / name / "receiver", dtype=torch.float32, attn_implementation="eager"
    ).eval()


def score_with_transformers(name: str, prompt: list[int], continuation: list[int]) -> tuple[list[float], list[bool]]:
    with torch.no_grad():
        logits = model_of(name)(torch.tensor([[*prompt, *continuation]])).logits[0, len(prompt) - 1 : -1]
    chosen = torch.log_softmax(logits.double(), dim=-1)[range(len(continuation)), continuation]
    return chosen.tolist(), (logits.argmax(dim=-1) == torch.tensor(continuation)).tolist()


def recorded_tokens(pair: str) -> list[tuple[list[dict[str, str]] | list[int], list[int]]]:
    """Every recorded prompt of a pair, with the sixteen tokens that the reference decoded greedily."""
    arrays = load_file(GOLDEN / pair / "expected.safetensors")
    found = []
    for index, case in enumerate(json.loads((GOLDEN / pair / "case.json").read_text())["cases"]):
        prompt = case.get("messages") or arrays[f"{index}.receiver_ids"][0].tolist()
        found.append((prompt, arrays[f"{index}.generated"][0].tolist()))
    return found


@each_pair
@pytest.mark.parametrize("continuation", [OTHER_IDS, OTHER_IDS[:1]], ids=["several tokens", "one token"])
def test_receiver_alone_scores_as_transformers(pair: str, continuation: list[int], recorded_pipeline: PipelineOf):
    expected, greedy = score_with_transformers(pair, IDS, continuation)
    score = recorded_pipeline(pair).score(input_ids=IDS, continuation=continuation, fuse=False)
    assert score.token_ids == continuation
    assert score.greedy == greedy
    np.testing.assert_allclose(score.log_probabilities, expected, rtol=0, atol=TOLERANCE)
    assert score.log_likelihood == pytest.approx(sum(expected), abs=len(expected) * TOLERANCE)


@each_pair
def test_receiver_alone_finds_what_transformers_decodes_greedy(pair: str, recorded_pipeline: PipelineOf):
    row = torch.tensor([IDS])
    with torch.no_grad():
        decoded = model_of(pair).generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=12)
    continuation = decoded[0, len(IDS) :].tolist()
    score = recorded_pipeline(pair).score(input_ids=IDS, continuation=continuation, fuse=False)
    assert score.is_greedy
    other = [*continuation[:4], (continuation[4] + 1) % 512, *continuation[5:]]
    score = recorded_pipeline(pair).score(input_ids=IDS, continuation=other, fuse=False)
    assert not score.is_greedy
    assert score.greedy[:5] == [True, True, True, True, False]


@each_pair
def test_the_recorded_tokens_of_the_reference_are_greedy(pair: str, recorded_pipeline: PipelineOf):
    for prompt, generated in recorded_tokens(pair):
        with recorded_pipeline(pair).prefill(prompt) as session:
            assert session.score(generated).greedy == [True] * 16


@each_pair
def test_log_probabilities_are_those_of_the_logits_that_decoding_sees(pair: str, recorded_pipeline: PipelineOf):
    # Each token's as if it were the first of a session that has generated those before it.
    pipe = recorded_pipeline(pair)
    prompt, generated = recorded_tokens(pair)[0]
    with pipe.prefill(prompt) as session, pipe.prefill(prompt) as stepwise:
        score = session.score(generated)
        for index, token_id in enumerate(generated):
            single = stepwise.score([token_id])
            assert single.log_probabilities == pytest.approx([score.log_probabilities[index]], abs=1e-6)
            assert stepwise.generate(max_new_tokens=1, **GREEDY).token_ids == [token_id]
        first = torch.log_softmax(torch.from_numpy(session.logits).double(), dim=-1)[generated[0]]
        assert score.log_probabilities[0] == pytest.approx(float(first), abs=1e-6)


def everything_of(session: Session, pipe: C2CPipeline) -> list[Any]:
    caches = [
        array.tolist() for layer in range(pipe.bundle.manifest.receiver.num_layers) for array in session.kv(layer)
    ]
    return [session.token_ids.tolist(), session.position_ids.tolist(), session.logits.tolist(), caches]


@every_kind
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("before", [0, 3], ids=["after the prompt", "within an answer"])
def test_a_session_goes_on_as_if_nothing_had_been_scored(
    name: str, fuse: bool, before: int, recorded_pipeline: PipelineOf
):
    pipe = recorded_pipeline(name)
    with pipe.prefill([QUESTION], fuse=fuse) as scored, pipe.prefill([QUESTION], fuse=fuse) as untouched:
        for session in (scored, untouched):
            if before:
                session.generate(max_new_tokens=before, **GREEDY)
        scored.score(OTHER_IDS)
        scored.score(OTHER_IDS[::-1])
        assert everything_of(scored, pipe) == everything_of(untouched, pipe)
        answers = [session.generate(max_new_tokens=6, **GREEDY) for session in (scored, untouched)]
        assert answers[0].token_ids == answers[1].token_ids
        scored.score(OTHER_IDS)
        for session in (scored, untouched):
            session.append([FOLLOW_UP])
        assert everything_of(scored, pipe) == everything_of(untouched, pipe)


@unaligned
def test_a_stream_goes_on_over_a_score(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    whole = pipe.generate(input_ids=IDS, max_new_tokens=8, **GREEDY).token_ids
    with pipe.prefill(IDS) as session:
        found: list[int] = []
        for chunk in session.stream(max_new_tokens=8, **GREEDY):
            found += chunk.token_ids
            session.score(OTHER_IDS)
    assert found == whole


@every_kind
def test_a_score_within_an_answer_counts_what_was_generated(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    whole = pipe.generate([QUESTION], max_new_tokens=9, **GREEDY).token_ids
    with pipe.prefill([QUESTION]) as session:
        at_once = session.score(whole)
        session.generate(max_new_tokens=4, **GREEDY)
        rest = session.score(whole[4:])
    assert rest.log_probabilities == pytest.approx(at_once.log_probabilities[4:], abs=1e-6)
    assert rest.is_greedy


@every_kind
@pytest.mark.parametrize("text", ["Paris, it is.", " Paris", "x"])
def test_text_is_tokenised_as_it_continues_the_prompt(name: str, text: str, recorded_pipeline: PipelineOf):
    tokenizer = tokenizer_of(name)
    prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, tokenize=False)
    length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    expected = tokenizer(prompt + text, add_special_tokens=False).input_ids[length:]
    with recorded_pipeline(name).prefill([QUESTION]) as session:
        score = session.score(text)
        assert score.token_ids == expected
        assert score == session.score(expected)


@unaligned
def test_text_continues_what_was_generated(name: str, recorded_pipeline: PipelineOf):
    tokenizer = tokenizer_of(name)
    ids = tokenizer("The capital", add_special_tokens=False).input_ids
    with recorded_pipeline(name).prefill(ids) as session:
        ids += session.generate(max_new_tokens=3, **GREEDY).token_ids
        before = tokenizer.decode(ids)
        whole = tokenizer(before + " of France", add_special_tokens=False).input_ids
        known = tokenizer(before, add_special_tokens=False).input_ids
        assert session.score(" of France").token_ids == whole[len(known) :]


@unaligned
@pytest.mark.parametrize(
    ("continuation", "message"),
    [
        ("", "has no tokens"),
        ([], "the continuation is empty"),
        ([3, 512], r"token 1 of the continuation is 512.*0 to 511"),
        ([-1], r"token 0 of the continuation is -1"),
        ([1.5], "integer token ids"),
        ([7] * 247, "capacity of 256"),
    ],
)
def test_what_cannot_be_scored_is_refused_and_changes_nothing(
    name: str, continuation: Any, message: str, recorded_pipeline: PipelineOf
):
    pipe = recorded_pipeline(name)
    whole = pipe.generate(input_ids=IDS, max_new_tokens=4, **GREEDY).token_ids
    with pipe.prefill(IDS) as session:
        with pytest.raises(UsageError, match=message):
            session.score(continuation)
        assert session.generate(max_new_tokens=4, **GREEDY).token_ids == whole


@unaligned
def test_a_continuation_may_fill_the_capacity(name: str, recorded_pipeline: PipelineOf):
    with recorded_pipeline(name).prefill(IDS) as session:
        assert len(session.score([7] * 246).token_ids) == 246
        session.generate(max_new_tokens=2, **GREEDY)
        with pytest.raises(UsageError, match="capacity"):
            session.score([7] * 245)
        assert len(session.score([7] * 244).token_ids) == 244


@unaligned
def test_text_that_would_merge_with_the_prompts_last_token_is_refused(name: str, recorded_pipeline: PipelineOf):
    tokenizer = tokenizer_of(name)
    word = next(
        text
        for text in sorted(tokenizer.get_vocab())
        if text.isalpha() and text.isascii() and len(tokenizer(text).input_ids) == 1 < len(text)
    )
    ids = tokenizer(word[:1], add_special_tokens=False).input_ids
    with (
        recorded_pipeline(name).prefill(ids) as session,
        pytest.raises(UsageError, match=r"begins inside a token.*token ids"),
    ):
        session.score(word[1:])


@unaligned
def test_a_closed_session_scores_nothing(name: str, recorded_pipeline: PipelineOf):
    session = recorded_pipeline(name).prefill(IDS)
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.score([1])


def test_logits_that_overflowed_are_refused():
    with pytest.raises(C2CError, match="nan found for token 1"):
        score_tokens(np.array([0.0, np.nan], dtype=np.float32), [0], lambda _, __: np.zeros(2, dtype=np.float32))


def test_large_logits_keep_their_differences():
    logits = np.array([1e4, 1e4 - 1, -1e30, -np.inf], dtype=np.float32)
    score = score_tokens(logits, [1], lambda _, __: logits)
    assert score.log_probabilities == pytest.approx([-1 - np.log1p(np.exp(-1.0))], abs=1e-9)
    assert score_tokens(logits, [3], lambda _, __: logits).log_likelihood == -np.inf
