"""What OpenAI's own client gets: the answers of the pipeline alone, whole and in streams, in OpenAI's forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Served, served_here

from runtime import C2CPipeline
from runtime.async_engine import AsyncC2CEngine

PAIR, TWO_SHARERS = "qwen3_from_llama_aligned", "two_sharers_parallel"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
IDS = [5, 77, 300, 12, 211, 8, 64, 9, 250, 33, 201]

pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture
def pipeline(recorded_pipeline: Callable[[str], C2CPipeline]) -> C2CPipeline:
    return recorded_pipeline(PAIR)


def ask(server: Served, **options: Any) -> Any:
    options = {"model": PAIR, "messages": MESSAGES, **GREEDY, **options}
    with server.openai() as client:
        return client.chat.completions.create(**options)


def read(server: Served, **options: Any) -> list[Any]:
    options = {"model": PAIR, "messages": MESSAGES, **GREEDY, **options}
    with server.openai() as client:
        return list(client.chat.completions.create(stream=True, **options))


def complete(server: Served, **options: Any) -> Any:
    options = {"model": PAIR, "prompt": IDS, **GREEDY, **options}
    with server.openai() as client:
        found = client.completions.create(**options)
        return list(found) if options.get("stream") else found


# --- chats ---


def test_a_chat_is_answered_as_the_pipeline_answers_it(server: Served, pipeline: C2CPipeline):
    expected = pipeline.generate(MESSAGES, max_new_tokens=24, ignore_eos=True)
    out = ask(server)
    [choice] = out.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason == "length"
    assert out.usage.completion_tokens == len(expected.token_ids) == 24
    with pipeline.prefill(MESSAGES) as session:
        assert out.usage.prompt_tokens == len(session.position_ids)
    assert out.usage.total_tokens == out.usage.prompt_tokens + 24
    assert (out.object, out.model, out.id[:9]) == ("chat.completion", PAIR, "chatcmpl-")


def test_the_receiver_alone_has_a_model_name_of_its_own(server: Served, pipeline: C2CPipeline):
    expected = pipeline.generate(MESSAGES, fuse=False, max_new_tokens=24, ignore_eos=True)
    assert expected.text != pipeline.generate(MESSAGES, max_new_tokens=24, ignore_eos=True).text
    assert ask(server, model=f"{PAIR}-receiver").choices[0].message.content == expected.text
    alone = {"ignore_eos": True, "fuse": False}
    assert ask(server, extra_body=alone).choices[0].message.content == expected.text


def test_parts_of_text_are_joined_and_developer_is_system(server: Served):
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": " of France?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert ask(server, messages=messages).choices == ask(server).choices


@pytest.mark.parametrize("seed", [0, 7])
def test_answer_i_of_n_is_drawn_with_seed_plus_i(seed: int, server: Served, pipeline: C2CPipeline):
    sampling = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 16}
    extra = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2, "ignore_eos": True}
    out = ask(server, n=3, seed=seed, extra_body=extra, **sampling)
    expected = [
        pipeline.generate(MESSAGES, max_new_tokens=16, temperature=1.5, top_p=0.9, seed=seed + index, **extra)
        for index in range(3)
    ]
    assert [choice.message.content for choice in out.choices] == [generation.text for generation in expected]
    assert [choice.index for choice in out.choices] == [0, 1, 2]
    assert len({generation.text for generation in expected}) == 3
    with pipeline.prefill(MESSAGES) as session:
        assert out.usage.prompt_tokens == len(session.position_ids)
    assert out.usage.completion_tokens == 3 * 16


def test_without_a_temperature_it_is_one_as_in_openais_api(server: Served, pipeline: C2CPipeline):
    expected = pipeline.generate(MESSAGES, max_new_tokens=24, ignore_eos=True, temperature=1.0, seed=3)
    assert expected.text != pipeline.generate(MESSAGES, max_new_tokens=24, ignore_eos=True).text
    with server.openai() as client:
        out = client.chat.completions.create(
            model=PAIR, messages=MESSAGES, max_tokens=24, seed=3, extra_body={"ignore_eos": True}
        )
    assert out.choices[0].message.content == expected.text


@pytest.mark.parametrize("several", [False, True])
def test_the_answer_ends_before_a_stop_text(several: bool, server: Served, pipeline: C2CPipeline):
    whole = pipeline.generate(MESSAGES, max_new_tokens=24, ignore_eos=True).text
    stop = whole[10:13]
    out = ask(server, stop=["never said", stop] if several else stop).choices[0]
    assert (out.message.content, out.finish_reason) == (whole[: whole.index(stop)], "stop")
    chunks = read(server, stop=stop)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]


def test_without_a_limit_it_goes_on_to_the_capacity(server: Served, pipeline: C2CPipeline):
    expected = pipeline.generate(MESSAGES, ignore_eos=True)
    out = ask(server, max_tokens=None)
    assert out.choices[0].message.content == expected.text
    assert out.usage.total_tokens == server.engine.bundle.manifest.max_length + 1  # the last token is in no cache


def test_max_completion_tokens_is_max_tokens(server: Served):
    assert ask(server, max_tokens=None, max_completion_tokens=5).usage.completion_tokens == 5
    assert ask(server, max_tokens=5, max_completion_tokens=5).usage.completion_tokens == 5


def test_sharers_are_chosen_by_request(
    recorded_bundle: Callable[[str], Path], recorded_pipeline: Callable[[str], C2CPipeline]
):
    pipeline = recorded_pipeline(TWO_SHARERS)
    engine = AsyncC2CEngine.from_bundle(recorded_bundle(TWO_SHARERS), num_threads=1, num_slots=2, allow_unchecked=True)
    try:
        with served_here(engine, model_name="two") as served:
            texts = set()
            for sharers in (None, [0], [1], [0, 1], []):
                extra = {"ignore_eos": True, "sharers": sharers}
                found = ask(served, model="two", extra_body=extra).choices[0].message.content
                expected = pipeline.generate(MESSAGES, max_new_tokens=24, ignore_eos=True, sharers=sharers)
                assert found == expected.text
                texts.add(found)
            assert len(texts) == 4
    finally:
        engine.close_and_wait()


# --- streams ---


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_says_what_the_whole_answer_says(usage: bool, server: Served):
    whole = ask(server, logprobs=True, top_logprobs=2)
    chunks = read(server, logprobs=True, top_logprobs=2, stream_options={"include_usage": usage})
    if usage:
        *chunks, last = chunks
        assert last.choices == []
        assert last.usage.completion_tokens == whole.usage.completion_tokens
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk.choices[0] for chunk in chunks]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert len([choice for choice in choices if choice.delta.content]) > 1
    reasons = [choice.finish_reason for choice in choices]
    assert reasons == [None] * (len(choices) - 1) + ["length"]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert tokens == whole.choices[0].logprobs.content


def test_a_stream_of_several_answers_has_the_pieces_of_each(server: Served):
    options = {"n": 3, "seed": 5, "temperature": 1.0}
    whole = ask(server, **options)
    chunks = read(server, **options)
    for index, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(piece.delta.content or "" for piece in mine) == choice.message.content
        assert [piece.finish_reason for piece in mine][-1] == choice.finish_reason
    ends = [chunk for chunk in chunks if chunk.choices[0].finish_reason]
    assert len(ends) == 3


def test_answers_to_one_prompt_are_no_cache_of_each_other(server: Served):
    messages = [{"role": "user", "content": "a prompt of several answers that nobody asked for before, " * 4}]
    body = {"model": PAIR, "messages": messages, "max_tokens": 2, "n": 8}
    with server.http() as client:
        usages = [client.post("/v1/chat/completions", json=body).json()["usage"] for _ in range(2)]
    first, again = (usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert first < again / 2, "no more than what the template begins with"
    assert again == usages[1]["prompt_tokens"] - 1


def test_the_end_tells_timings_and_reused_tokens(server: Served):
    names = {"queued", "sharer_prefill", "receiver_prefill", "fuse", "ttft", "decode"}
    messages = [{"role": "user", "content": "A prompt that no other test of this file has."}]
    first, again = (ask(server, messages=messages) for _ in range(2))
    assert set(first.c2c["timings"]) == names
    assert first.c2c["timings"]["ttft"] >= first.c2c["timings"]["fuse"] > 0
    assert first.c2c["timings"]["decode"] > 0
    assert first.usage.prompt_tokens_details.cached_tokens == first.c2c["reused_tokens"]
    assert again.usage.prompt_tokens_details.cached_tokens == again.c2c["reused_tokens"] > 0
    chunks = read(server, messages=messages)
    told = [chunk.c2c for chunk in chunks if chunk.c2c]
    assert len(told) == 1
    assert set(told[0]["timings"]) == names
    assert chunks[-1].c2c == told[0]


def test_events_end_with_done(server: Served):
    body = {"model": PAIR, "messages": MESSAGES, "max_tokens": 3, "stream": True}
    with server.http() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]


# --- log-probabilities ---


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_logprobs_are_those_of_the_models_logits(server: Served, pipeline: C2CPipeline):
    # A temperature changes the choice, not what is told.
    out = ask(server, logprobs=True, top_logprobs=4, temperature=1.7, seed=11).choices[0].logprobs.content
    with pipeline.prefill(MESSAGES) as session:
        scores = log_softmax(session.logits)
        ids = session.generate(max_new_tokens=24, ignore_eos=True, temperature=1.7, seed=11).token_ids
    assert len(out) == len(ids) == 24
    texts = [pipeline.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    assert [token.token for token in out] == texts
    assert out[0].logprob == pytest.approx(scores[ids[0]], abs=1e-5)
    likeliest = np.argsort(-scores)[:4]
    assert [token.logprob for token in out[0].top_logprobs] == pytest.approx(list(scores[likeliest]), abs=1e-5)
    for token in out:
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_no_alternatives_are_told_unless_asked_for(server: Served):
    assert ask(server).choices[0].logprobs is None
    told = ask(server, logprobs=True).choices[0].logprobs.content
    assert len(told) == 24
    assert all(token.top_logprobs == [] for token in told)


# --- completions ---


def test_token_ids_are_gone_on_with_as_by_the_pipeline(server: Served, pipeline: C2CPipeline):
    expected = pipeline.generate(input_ids=IDS, max_new_tokens=24, ignore_eos=True)
    out = complete(server)
    assert (out.object, out.id[:5], out.model) == ("text_completion", "cmpl-", PAIR)
    [choice] = out.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected.text, "length", 0)
    assert (out.usage.prompt_tokens, out.usage.completion_tokens) == (len(IDS), 24)
    alone = pipeline.generate(input_ids=IDS, fuse=False, max_new_tokens=24, ignore_eos=True)
    assert complete(server, model=f"{PAIR}-receiver").choices[0].text == alone.text


def test_text_is_gone_on_with_without_a_chat_template(server: Served, pipeline: C2CPipeline):
    text = "The capital of France<|im_end|> is"
    ids = pipeline.receiver_tokenizer.encode(text).ids
    expected = pipeline.generate(input_ids=ids, max_new_tokens=24, ignore_eos=True)
    out = complete(server, prompt=text)
    assert (out.choices[0].text, out.usage.prompt_tokens) == (expected.text, len(ids))


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_have_n_answers_each(stream: bool, server: Served, pipeline: C2CPipeline):
    prompts = [IDS, IDS[:4]]
    options = {"prompt": prompts, "n": 2, "seed": 4, "temperature": 1.0, "stream": stream}
    out = complete(server, **options)
    expected = [
        pipeline.generate(input_ids=ids, max_new_tokens=24, ignore_eos=True, temperature=1.0, seed=seed).text
        for ids in prompts
        for seed in (4, 5)
    ]
    if stream:
        pieces = [chunk.choices[0] for chunk in out]
        texts = ["".join(piece.text for piece in pieces if piece.index == index) for index in range(4)]
        assert sorted(piece.index for piece in pieces if piece.finish_reason) == [0, 1, 2, 3]
    else:
        texts = [choice.text for choice in out.choices]
        assert out.usage.prompt_tokens == len(IDS) + 4
        assert out.usage.completion_tokens == 4 * 24
    assert texts == expected


def test_texts_are_prompts_of_their_own(server: Served):
    out = complete(server, prompt=["Paris is", "Rome is"])
    alone = [complete(server, prompt=text).choices[0].text for text in ("Paris is", "Rome is")]
    assert [choice.text for choice in out.choices] == alone


def test_a_completion_without_a_limit_has_sixteen_tokens(server: Served):
    assert complete(server, max_tokens=None).usage.completion_tokens == 16
    with server.openai() as client:
        extra = {"ignore_eos": True}
        assert client.completions.create(model=PAIR, prompt=IDS, extra_body=extra).usage.completion_tokens == 16
        capacity = server.engine.bundle.manifest.max_length
        # Where there is no room for sixteen, those that have room.
        out = client.completions.create(model=PAIR, prompt=[5] * (capacity - 3), extra_body=extra)
    assert out.usage.completion_tokens == 4


def test_logprobs_of_a_completion_are_those_of_the_chat_form(server: Served, pipeline: C2CPipeline):
    whole = complete(server, logprobs=3)
    told = whole.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 24
    with pipeline.prefill(IDS) as session:
        scores = log_softmax(session.logits)
        first = session.generate(max_new_tokens=1, ignore_eos=True).token_ids[0]
    assert told.token_logprobs[0] == pytest.approx(scores[first], abs=1e-5)
    # Two of the likeliest may be parts of characters, which have one text.
    assert list(told.top_logprobs[0].values()) == pytest.approx(sorted(scores)[-2:][::-1], abs=1e-5)
    assert told.text_offset == [sum(map(len, told.tokens[:index])) for index in range(24)]
    assert complete(server, logprobs=0).choices[0].logprobs.top_logprobs is None
    pieces = [chunk.choices[0].logprobs for chunk in complete(server, logprobs=3, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for piece in pieces if piece for value in getattr(piece, name)] == getattr(told, name)
