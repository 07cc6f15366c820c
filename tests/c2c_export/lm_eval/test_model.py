"""The harness's model over a pair: what contexts mean, what the harness may ask for, and its caches."""

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval_runs import answers, be_local, evaluate, requests
from recorded_pairs import each_pair

from c2c_export.errors import UsageError
from c2c_export.lm_eval.contexts import ChatContext
from c2c_export.lm_eval.model import C2CLanguageModel
from runtime import C2CPipeline, Message

UNALIGNED, CLOSING_PADDING, TWO_SHARERS = "qwen3_from_qwen2", "qwen3_from_llama_aligned", "two_sharers_parallel"
QUESTION = {"role": "user", "content": "What is the capital of France?"}
CHAT = {"apply_chat_template": True, "fewshot_as_multiturn": True}

BundleOf = Callable[[str], Path]
PipelineOf = Callable[[str], C2CPipeline]
unaligned = pytest.mark.xdist_group(UNALIGNED)


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_local(monkeypatch, tmp_path)


def open_model(bundle: Path, **model_args: Any) -> C2CLanguageModel:
    return C2CLanguageModel(bundle=str(bundle), num_threads=1, allow_unchecked=True, **model_args)


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


def answer(model: C2CLanguageModel, context: str, **gen_kwargs: Any) -> str:
    return model.generate_until([request("generate_until", context, gen_kwargs)], disable_tqdm=True)[0]


def chat_of(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    chat = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return chat if system is None else [{"role": "system", "content": system}, *chat]


def messages_of(context: ChatContext) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in context.messages]


# --- what a context means ---


@each_pair
def test_chats_are_answered_like_the_pipelines_messages(
    pair: str, recorded_bundle: BundleOf, recorded_pipeline: PipelineOf
):
    pipe = recorded_pipeline(pair)
    tasks = ("capitals_choice", "capitals_answer")
    found = evaluate("c2c", {"bundle": str(recorded_bundle(pair))}, *tasks, num_fewshot=1, **CHAT)
    for (context, continuation), (value, greedy) in zip(
        requests(found, tasks[0]), answers(found, tasks[0]), strict=True
    ):
        assert len(context.messages) == 3
        score = pipe.score(messages_of(context), continuation=continuation)
        assert value == pytest.approx(score.log_likelihood, abs=1e-5)
        assert greedy == score.is_greedy
    for (context, _), text in zip(requests(found, tasks[1]), answers(found, tasks[1]), strict=True):
        assert text == pipe.generate(messages_of(context), max_new_tokens=12, stop=["\n\n", "e"]).text


@each_pair
def test_raw_contexts_are_fused_token_ids(pair: str, recorded_bundle: BundleOf, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(pair)
    found = evaluate("c2c", {"bundle": str(recorded_bundle(pair))}, "capitals_choice")
    for (context, continuation), (value, _) in zip(
        requests(found, "capitals_choice"), answers(found, "capitals_choice"), strict=True
    ):
        ids, whole = (pipe.tokenizer.encode(text).ids for text in (context, context + continuation))
        score = pipe.score(input_ids=ids, continuation=whole[len(ids) :])
        assert value == pytest.approx(score.log_likelihood, abs=1e-5)


@each_pair
def test_a_reply_that_the_task_begins_is_continued(pair: str, recorded_bundle: BundleOf, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(pair)
    tasks = ("capitals_begun_choice", "capitals_begun_answer")
    found = evaluate("c2c", {"bundle": str(recorded_bundle(pair))}, *tasks, **CHAT)
    for (context, continuation), (value, _) in zip(requests(found, tasks[0]), answers(found, tasks[0]), strict=True):
        assert context.endswith(context.reply)
        with pipe.prefill(messages_of(context)) as session:
            both, begun = session.score(context.reply + continuation), session.score(context.reply)
        rest = both.log_probabilities[len(begun.token_ids) :]
        assert value == pytest.approx(sum(rest), abs=1e-5)
    for (context, _), text in zip(requests(found, tasks[1]), answers(found, tasks[1]), strict=True):
        with pipe.prefill(messages_of(context)) as session:
            session.begin_reply(context.reply)
            assert text == session.generate(max_new_tokens=12, stop=["\n\n", "e"]).text


@pytest.mark.xdist_group(TWO_SHARERS)
@pytest.mark.parametrize(("sharers", "expected"), [(None, [0, 1]), (1, [1]), ("0+1", [0, 1]), ([0], [0])], ids=str)
def test_the_sharers_that_are_named_are_fused(
    sharers: Any, expected: list[int], recorded_bundle: BundleOf, recorded_pipeline: PipelineOf
):
    model = open_model(recorded_bundle(TWO_SHARERS), sharers=sharers)
    text = answer(model, model.apply_chat_template([QUESTION]), max_gen_toks=12)
    assert text == recorded_pipeline(TWO_SHARERS).generate([QUESTION], sharers=expected, max_new_tokens=12).text
    assert model.get_model_info()["sharers"] == expected


@pytest.mark.xdist_group(CLOSING_PADDING)
def test_a_rolling_log_likelihood_is_the_receivers_own(recorded_bundle: BundleOf):
    bundle = str(recorded_bundle(CLOSING_PADDING))
    fused, alone = (evaluate("c2c", {"bundle": bundle, "fuse": fuse}, "capitals_text") for fuse in (True, False))
    assert answers(fused, "capitals_text") == answers(alone, "capitals_text")


@unaligned
def test_an_empty_context_is_the_begin_token(recorded_bundle: BundleOf, recorded_pipeline: PipelineOf):
    model = open_model(recorded_bundle(UNALIGNED))
    found = model.loglikelihood([request("loglikelihood", "", "Paris")], disable_tqdm=True)[0]
    pipe = recorded_pipeline(UNALIGNED)
    ids = pipe.tokenizer.encode("Paris", add_special_tokens=False).ids
    score = pipe.score(input_ids=[model.prefix_token_id], continuation=ids)
    assert found == (pytest.approx(score.log_likelihood), score.is_greedy)
    assert isinstance(answer(model, "", max_gen_toks=2), str)


# --- generation options ---


@unaligned
def test_sampling_options_reach_the_runtime(recorded_bundle: BundleOf, recorded_pipeline: PipelineOf):
    model, pipe = open_model(recorded_bundle(UNALIGNED)), recorded_pipeline(UNALIGNED)
    context = model.apply_chat_template([QUESTION])
    options = {"temperature": 1.5, "top_k": 40, "seed": 3}
    expected = pipe.generate([QUESTION], max_new_tokens=10, **options).text
    assert answer(model, context, max_gen_toks=10, do_sample=True, **options) == expected
    greedy = pipe.generate([QUESTION], max_new_tokens=10).text
    assert answer(model, context, max_new_tokens=10, do_sample=False, **options) == greedy != expected
    assert answer(model, context, max_gen_toks=10, temperature=0.0, num_beams=1) == greedy


@unaligned
def test_a_special_token_in_until_ends_an_answer(recorded_bundle: BundleOf, recorded_pipeline: PipelineOf):
    model, pipe = open_model(recorded_bundle(UNALIGNED)), recorded_pipeline(UNALIGNED)
    specials = {token_id for token_id, token in pipe.tokenizer.get_added_tokens_decoder().items() if token.special}
    options = {"temperature": 50.0, "max_new_tokens": 200}
    for seed in range(20):
        ids = pipe.generate([QUESTION], seed=seed, **options).token_ids
        inner = [index for index, token_id in enumerate(ids[:-1]) if token_id in specials]
        if inner:
            break
    until = pipe.tokenizer.id_to_token(ids[inner[0]])
    found = answer(model, model.apply_chat_template([QUESTION]), seed=seed, do_sample=True, until=[until], **options)
    assert found == pipe.tokenizer.decode(ids[: inner[0]], skip_special_tokens=True)


@unaligned
@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"beam_width": 2}, r"beam_width is not supported; expected until, max_gen_toks"),
        ({"num_beams": 4}, "num_beams is 4"),
        ({"temperature": 0.7}, r"temperature is 0\.7 without do_sample; expected do_sample=true"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0"),
        ({"until": 3}, "until is 3"),
        ({"max_gen_toks": 256}, "leave no room.*capacity of 256; lower max_gen_toks"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(gen_kwargs: Any, message: str, recorded_bundle: BundleOf):
    with pytest.raises(UsageError, match=message):
        answer(open_model(recorded_bundle(UNALIGNED)), "Hello", **gen_kwargs)


@unaligned
def test_an_answer_to_a_long_chat_is_shorter_than_asked(
    recorded_bundle: BundleOf, recorded_pipeline: PipelineOf, caplog: pytest.LogCaptureFixture
):
    model, pipe = open_model(recorded_bundle(UNALIGNED)), recorded_pipeline(UNALIGNED)
    chat = chat_of("x " * 80)
    assert answer(model, model.apply_chat_template(chat)) == pipe.generate(chat).text
    assert "1 answers may have fewer tokens than max_gen_toks, as the bundle's capacity is 256" in caplog.text
    with pytest.raises(UsageError, match="capacity is 256"):
        answer(model, model.apply_chat_template(chat_of("x " * 300)))


@unaligned
def test_a_request_that_is_refused_is_refused_before_any_is_computed(
    recorded_bundle: BundleOf, monkeypatch: pytest.MonkeyPatch
):
    model = open_model(recorded_bundle(UNALIGNED))
    monkeypatch.setattr(C2CPipeline, "prefill", lambda *_, **__: pytest.fail("computed"))
    good, bad = model.apply_chat_template([QUESTION]), model.apply_chat_template(chat_of("x " * 300))
    with pytest.raises(UsageError):
        model.generate_until([request("generate_until", context, {}) for context in (good, bad)])
    with pytest.raises(UsageError):
        model.loglikelihood([request("loglikelihood", context, "Yes") for context in (good, bad)])


# --- arguments ---


@unaligned
@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"pretrained": "x"}, "unknown argument pretrained; expected bundle, engine, precision"),
        ({"fuse": "no"}, "fuse is 'no', expected true or false"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"sharers": "first"}, "sharers is 'first', expected sharer numbers"),
        ({"sharers": 3}, "sharer 3: this bundle has sharers 0 to 0"),
        ({"precision": "int3"}, "int3"),
        ({"batch_size": 8}, "--batch_size 8"),
        ({"max_batch_size": 8}, "--max_batch_size 8"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_by_name(model_args: Mapping[str, Any], message: str, recorded_bundle: BundleOf):
    with pytest.raises(UsageError, match=message):
        C2CLanguageModel(bundle=str(recorded_bundle(UNALIGNED)), allow_unchecked=True, **model_args)


def test_the_bundle_must_be_named():
    with pytest.raises(UsageError, match="bundle is missing"):
        C2CLanguageModel()


@unaligned
@pytest.mark.parametrize("batch_size", [None, 1, "1", "auto", "auto:4"])
def test_one_request_at_a_time_is_a_batch_size(batch_size: Any, recorded_bundle: BundleOf):
    # The harness passes the device "cuda:0" where nobody asked for one.
    C2CLanguageModel(
        bundle=str(recorded_bundle(UNALIGNED)), allow_unchecked=True, batch_size=batch_size, device="cuda:0"
    )


@unaligned
def test_a_named_chat_template_is_refused(recorded_bundle: BundleOf):
    model = open_model(recorded_bundle(UNALIGNED))
    assert model.chat_template(True) == model._tokenizer.chat_template
    assert model.chat_template(False) is None
    with pytest.raises(UsageError, match="--apply_chat_template rag"):
        model.chat_template("rag")


# --- the harness's caches ---


def test_a_chat_survives_copies_and_pickles():
    context = ChatContext("<user>Hi<assistant>It", [Message("user", "Hi")], "It")
    for other in (copy.copy(context), copy.deepcopy(context), pickle.loads(pickle.dumps(context))):
        assert type(other) is ChatContext
        assert (str(other), other.messages, other.reply) == (str(context), context.messages, "It")


@unaligned
def test_cached_requests_keep_their_messages(recorded_bundle: BundleOf):
    arguments, tasks = {"bundle": str(recorded_bundle(UNALIGNED))}, ("capitals_choice", "capitals_begun_answer")
    first, second = (evaluate("c2c", arguments, *tasks, cache_requests=True, **CHAT) for _ in range(2))
    for task in tasks:
        assert answers(first, task) == answers(second, task)
        assert [request[0].messages for request in requests(second, task)] == [
            request[0].messages for request in requests(first, task)
        ]


@unaligned
def test_cached_answers_are_not_computed_again(
    recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tasks = ("capitals_choice", "capitals_answer", "capitals_text")
    arguments, options = {"bundle": str(recorded_bundle(UNALIGNED))}, {"use_cache": str(tmp_path / "answers")}
    first = evaluate("c2c", arguments, *tasks, **options)
    monkeypatch.setattr("runtime.session.Session.score", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr("runtime.session.Session.stream", lambda *_: pytest.fail("computed"))
    second = evaluate("c2c", arguments, *tasks, **options)
    for task in tasks:
        assert [tuple(a) if isinstance(a, list) else a for a in answers(second, task)] == answers(first, task)


@unaligned
def test_sampled_answers_are_drawn_again_in_spite_of_a_cache(recorded_bundle: BundleOf, tmp_path: Path):
    # The harness passes over its cache for do_sample alone, which is why temperature without it is refused.
    arguments, options = {"bundle": str(recorded_bundle(UNALIGNED))}, {"use_cache": str(tmp_path / "answers")}
    sampling = {"do_sample": True, "temperature": 50.0}
    first, second = (
        evaluate("c2c", arguments, "capitals_answer", gen_kwargs=sampling, numpy_random_seed=seed, **options)
        for seed in (1, 2)
    )
    assert answers(first, "capitals_answer") != answers(second, "capitals_answer")


@unaligned
def test_cached_answers_of_another_model_are_refused(recorded_bundle: BundleOf, tmp_path: Path):
    arguments, options = {"bundle": str(recorded_bundle(UNALIGNED))}, {"use_cache": str(tmp_path / "answers")}
    evaluate("c2c", arguments, "capitals_text", **options)
    with pytest.raises(UsageError, match=r"answers_rank0\.db holds the answers of another model"):
        evaluate("c2c", {**arguments, "fuse": False}, "capitals_text", **options)


@unaligned
@pytest.mark.parametrize("package", ["c2c-export", "onnxruntime"])
def test_cached_answers_of_another_version_are_refused(
    package: str, recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments, options = {"bundle": str(recorded_bundle(UNALIGNED))}, {"use_cache": str(tmp_path / "answers")}
    evaluate("c2c", arguments, "capitals_text", **options)
    module = {"c2c-export": "c2c_export", "onnxruntime": "onnxruntime"}[package]
    monkeypatch.setattr(f"{module}.__version__", "0.0.1")
    with pytest.raises(UsageError, match="holds the answers of another model"):
        evaluate("c2c", arguments, "capitals_text", **options)


@unaligned
@pytest.mark.parametrize("first_is_chat", [True, False])
def test_an_answer_to_a_chat_is_none_to_its_text(first_is_chat: bool, recorded_bundle: BundleOf, tmp_path: Path):
    first, second = (CHAT, {}) if first_is_chat else ({}, CHAT)
    arguments, options = {"bundle": str(recorded_bundle(UNALIGNED))}, {"use_cache": str(tmp_path / "answers")}
    evaluate("c2c", arguments, "capitals_answer", **first, **options)
    kinds = ["chats", "raw contexts"] if first_is_chat else ["raw contexts", "chats"]
    with pytest.raises(UsageError, match=rf"answers_rank0\.db holds answers to {kinds[0]}, this run has {kinds[1]}"):
        evaluate("c2c", arguments, "capitals_answer", **second, **options)


@unaligned
def test_a_run_whose_every_answer_is_one_to_a_chat_of_the_same_text_is_refused(
    recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def as_it_is(_: object, chat: list[dict[str, str]], add_generation_prompt: bool) -> ChatContext:
        assert add_generation_prompt
        return ChatContext(chat[-1]["content"], [Message("user", chat[-1]["content"])], "")

    monkeypatch.setattr("c2c_export.lm_eval.model.render_chat", as_it_is)
    arguments, options = {"bundle": str(recorded_bundle(UNALIGNED))}, {"use_cache": str(tmp_path / "answers")}
    evaluate("c2c", arguments, "capitals_answer", **CHAT, **options)
    monkeypatch.setattr("runtime.session.Session.stream", lambda *_: pytest.fail("computed"))
    with pytest.raises(UsageError, match="holds answers to chats, this run has raw contexts"):
        evaluate("c2c", arguments, "capitals_answer", **options)
