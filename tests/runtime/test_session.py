"""Sessions: further turns equal a fresh session over the whole chat; slots are given back and hold real rows only."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_pairs import (
    PipelineOf,
    every_kind,
    tokenizer_of,
    unaligned,
)

from runtime import C2CError, C2CPipeline, Session, UsageError

QUESTION = {"role": "user", "content": "What is the capital of France?"}
FOLLOW_UP = {"role": "user", "content": "And of Spain?"}
ANSWER = {"role": "assistant", "content": "Paris, it is."}
IDS = [5, 77, 300, 12, 511, 8, 64, 9, 250]
LONG_IDS = [5 + index % 50 for index in range(150)]
GREEDY = {"ignore_eos": True}


def decode(name: str, ids: list[int]) -> str:
    return tokenizer_of(name).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def assert_equals_fresh(session: Session, pipe: C2CPipeline, prompt: Any, **options: Any) -> None:
    """`session` holds what a fresh one over `prompt` holds, bit for bit, and goes on alike (which changes it)."""
    # Heads that are no multiple of 8 keep the portable Attention, whose sums round by the number of rows in use.
    models = [pipe.bundle.manifest.receiver, *(sharer.model for sharer in pipe.bundle.manifest.sharers)]
    exact = not any(model.head_dim % 8 for model in models)
    with pipe.prefill(prompt, **options) as fresh:
        assert session.token_ids.tolist() == fresh.token_ids.tolist()
        assert session.position_ids.tolist() == fresh.position_ids.tolist()
        assert session.plan.sections == fresh.plan.sections
        for layer in range(pipe.bundle.manifest.receiver.num_layers):
            for found, expected in zip(session.kv(layer), fresh.kv(layer), strict=True):
                np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-4)
        np.testing.assert_allclose(session.logits, fresh.logits, rtol=0, atol=0 if exact else 1e-3)
        assert session.generate(max_new_tokens=8, **GREEDY).token_ids == (
            fresh.generate(max_new_tokens=8, **GREEDY).token_ids
        )


@every_kind
@pytest.mark.parametrize("fuse", [True, False])
def test_appended_turns_equal_a_fresh_session(name: str, fuse: bool, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    with pipe.prefill([QUESTION], fuse=fuse) as session:
        session.append([ANSWER, FOLLOW_UP])
        assert_equals_fresh(session, pipe, [QUESTION, ANSWER, FOLLOW_UP], fuse=fuse)


@every_kind
@pytest.mark.parametrize("fuse", [True, False])
def test_append_takes_what_was_generated_as_the_assistants_turn(name: str, fuse: bool, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    with pipe.prefill([QUESTION], fuse=fuse) as session:
        answer = session.generate(max_new_tokens=10, **GREEDY)
        session.append([FOLLOW_UP])
        assert_equals_fresh(session, pipe, [QUESTION, assistant(answer.text), FOLLOW_UP], fuse=fuse)


@every_kind
def test_append_prefers_an_explicit_assistant_message(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    with pipe.prefill([QUESTION]) as session:
        session.generate(max_new_tokens=10, **GREEDY)
        session.append([ANSWER, FOLLOW_UP])
        assert_equals_fresh(session, pipe, [QUESTION, ANSWER, FOLLOW_UP])


@every_kind
def test_several_turns_equal_a_fresh_session_after_each(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    chat: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}, QUESTION]
    with pipe.prefill(chat) as session:
        for turn in ("And of Spain?", "Why?"):
            answer = session.generate(max_new_tokens=6, **GREEDY)
            chat += [assistant(answer.text), {"role": "user", "content": turn}]
            session.append(turn)
            with pipe.prefill(chat) as other:  # another slot in use must not matter
                other.generate(max_new_tokens=4, **GREEDY)
        assert_equals_fresh(session, pipe, chat)


@every_kind
@pytest.mark.parametrize("fuse", [True, False])
def test_appended_ids_equal_a_fresh_session(name: str, fuse: bool, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    with pipe.prefill(IDS, fuse=fuse) as session:
        generated = session.generate(max_new_tokens=5, **GREEDY).token_ids
        session.append([7, 8])
        assert_equals_fresh(session, pipe, [*IDS, *generated, 7, 8], fuse=fuse)
        session.append(np.array([100, 101]))
        last = session.token_ids.tolist()[:-2]
        assert session.token_ids.tolist() == [*last, 100, 101]


@every_kind
def test_generating_twice_equals_generating_once_longer(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    with pipe.prefill([QUESTION]) as twice, pipe.prefill([QUESTION]) as once:
        parts = [twice.generate(max_new_tokens=count, **GREEDY) for count in (1, 5, 6)]
        whole = once.generate(max_new_tokens=12, **GREEDY)
        assert [token for part in parts for token in part.token_ids] == whole.token_ids
        assert twice.token_ids.tolist() == once.token_ids.tolist()
        assert twice.position_ids.tolist() == once.position_ids.tolist()
        for layer in range(pipe.bundle.manifest.receiver.num_layers):
            np.testing.assert_array_equal(twice.kv(layer), once.kv(layer))


@every_kind
@pytest.mark.parametrize("first", [1, 2, 3, 4, 5])
def test_reply_of_several_generations_is_the_text_of_all_their_tokens(
    name: str, first: int, recorded_pipeline: PipelineOf
):
    # A character whose bytes two calls share must not turn into two replacement characters.
    pipe = recorded_pipeline(name)
    with pipe.prefill([QUESTION]) as session:
        ids = session.generate(max_new_tokens=first, **GREEDY).token_ids
        ids += session.generate(max_new_tokens=4, **GREEDY).token_ids
        session.append([FOLLOW_UP])
        assert_equals_fresh(session, pipe, [QUESTION, assistant(decode(name, ids)), FOLLOW_UP])


@every_kind
def test_kv_holds_the_real_rows_only(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    model = pipe.bundle.manifest.receiver
    with pipe.prefill([QUESTION]) as session:
        num_rows = len(session.plan.receiver.ids)
        for generated in (0, 1, 4):
            # The last generated token has no row until something follows it.
            rows = num_rows + max(0, generated - 1)
            for layer in range(model.num_layers):
                for array in session.kv(layer):
                    assert array.shape == (model.num_key_value_heads, rows, model.head_dim)
                    assert array.dtype == np.float32
            assert session.position_ids.shape == session.token_ids.shape == (rows,)
            assert session.position_ids[num_rows:].tolist() == [
                session.plan.num_positions + index for index in range(rows - num_rows)
            ]
            session.generate(max_new_tokens=1 if generated == 0 else 3, **GREEDY)
        session.kv(0)[0][:] = 7.0
        assert not (session.kv(0)[0] == 7.0).any(), "kv gives copies"


@unaligned
@pytest.mark.parametrize("layer", [-1, 4, 100])
def test_kv_of_a_layer_that_is_not_there_is_refused(name: str, layer: int, recorded_pipeline: PipelineOf):
    with recorded_pipeline(name).prefill(IDS) as session, pytest.raises(UsageError, match=f"layer {layer}.* 0 to 3"):
        session.kv(layer)


@every_kind
def test_logits_stay_those_of_the_prompt(name: str, recorded_pipeline: PipelineOf):
    with recorded_pipeline(name).prefill([QUESTION]) as session:
        before = session.logits.copy()
        assert before.shape == (512,)
        session.generate(max_new_tokens=3, **GREEDY)
        np.testing.assert_array_equal(session.logits, before)


@every_kind
def test_sessions_side_by_side_do_not_disturb_each_other(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    alone = [pipe.generate([turn], max_new_tokens=12, **GREEDY).token_ids for turn in (QUESTION, FOLLOW_UP)]
    with pipe.prefill([QUESTION]) as first, pipe.prefill([FOLLOW_UP]) as second:
        streams = [session.stream(max_new_tokens=12, **GREEDY) for session in (first, second)]
        found: list[list[int]] = [[], []]
        for chunks in zip(*streams, strict=True):
            for ids, chunk in zip(found, chunks, strict=True):
                ids += chunk.token_ids
    assert found == alone


@pytest.fixture
def one_slot(recorded_bundle: Callable[[str], Path], name: str) -> C2CPipeline:
    return C2CPipeline.from_bundle(recorded_bundle(name), num_slots=1, num_threads=1)


@unaligned
def test_too_many_sessions_are_refused_clearly(name: str, one_slot: C2CPipeline):
    with one_slot.prefill(IDS), pytest.raises(C2CError, match=r"all 1 slots are in use.*num_slots"):
        one_slot.prefill(IDS)


@unaligned
def test_closing_frees_the_slot_once(name: str, one_slot: C2CPipeline):
    session = one_slot.prefill(IDS)
    session.close()
    session.close()
    with one_slot.prefill(IDS), pytest.raises(C2CError, match="slots are in use"):
        one_slot.prefill(IDS)


@unaligned
def test_dropping_a_session_frees_its_slot(name: str, one_slot: C2CPipeline):
    for _ in range(3):
        session = one_slot.prefill(IDS)
        session.generate(max_new_tokens=2)
        del session
        gc.collect()


@unaligned
def test_a_stream_that_is_dropped_frees_its_slot(name: str, one_slot: C2CPipeline):
    for reads in (0, 1):
        stream = one_slot.stream(input_ids=IDS, max_new_tokens=5)
        for _ in range(reads):
            next(stream)
        del stream
        gc.collect()
    one_slot.generate(input_ids=IDS, max_new_tokens=1)


@unaligned
def test_a_refused_prompt_or_option_leaves_the_slot_free(name: str, one_slot: C2CPipeline):
    refused: list[Callable[[], object]] = [
        lambda: one_slot.prefill([1] * 1000),
        lambda: one_slot.generate(input_ids=IDS, max_new_tokens=0),
        lambda: one_slot.stream(input_ids=IDS, max_new_tokens=0),
        lambda: one_slot.stream(input_ids=IDS, top_k=-1),
    ]
    for call in refused:
        with pytest.raises(UsageError) as kept:
            call()
        # The error, and with it the frames that hold the session, is still referenced here.
        one_slot.generate(input_ids=IDS, max_new_tokens=1)
        assert kept.value


@unaligned
@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.generate(max_new_tokens=1),
        lambda session: session.stream(max_new_tokens=1),
        lambda session: session.append([7]),
        lambda session: session.kv(0),
    ],
    ids=["generate", "stream", "append", "kv"],
)
def test_a_closed_session_cannot_be_used(name: str, use: Callable[[Session], object], recorded_pipeline: PipelineOf):
    session = recorded_pipeline(name).prefill(IDS)
    session.close()
    with pytest.raises(UsageError, match="closed"):
        use(session)


@unaligned
def test_a_stream_of_a_closed_session_cannot_go_on(name: str, one_slot: C2CPipeline):
    closed = one_slot.prefill(IDS)
    stream = closed.stream(max_new_tokens=5, **GREEDY)
    next(stream)
    closed.close()
    with one_slot.prefill(IDS[::-1]) as session:  # in the same slot
        before = session.kv(0)
        with pytest.raises(UsageError, match="closed"):
            next(stream)
        np.testing.assert_array_equal(session.kv(0), before)


@every_kind
@pytest.mark.parametrize("held", [True, False], ids=["stream kept", "stream dropped"])
def test_an_abandoned_stream_leaves_a_usable_session(name: str, held: bool, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    whole = pipe.generate([QUESTION], max_new_tokens=12, **GREEDY).token_ids
    with pipe.prefill([QUESTION]) as session:
        stream = session.stream(max_new_tokens=12, **GREEDY)
        ids = [token for _ in range(5) for token in next(stream).token_ids]
        if not held:
            del stream
        ids += session.generate(max_new_tokens=7, **GREEDY).token_ids
        assert ids == whole
        session.append([FOLLOW_UP])
        assert_equals_fresh(session, pipe, [QUESTION, assistant(decode(name, whole)), FOLLOW_UP])


@every_kind
@pytest.mark.parametrize("held", [True, False], ids=["stream kept", "stream dropped"])
def test_append_after_an_abandoned_stream_takes_the_text_that_was_read(
    name: str, held: bool, recorded_pipeline: PipelineOf
):
    pipe = recorded_pipeline(name)
    with pipe.prefill([QUESTION]) as session:
        stream = session.stream(max_new_tokens=12, **GREEDY)
        ids = [token for _ in range(5) for token in next(stream).token_ids]
        if not held:
            del stream
        session.append([FOLLOW_UP])
        chat = [QUESTION, assistant(decode(name, ids)), FOLLOW_UP]
        assert_equals_fresh(session, pipe, chat)


@unaligned
def test_a_stream_of_an_earlier_turn_cannot_go_on(name: str, recorded_pipeline: PipelineOf):
    with recorded_pipeline(name).prefill([QUESTION]) as session:
        stream = session.stream(max_new_tokens=12, **GREEDY)
        next(stream)
        session.append([FOLLOW_UP])
        before = session.token_ids.tolist()
        with pytest.raises(UsageError):
            next(stream)
        assert session.token_ids.tolist() == before


@every_kind
def test_a_refused_append_leaves_the_session_as_it_was(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    whole = pipe.generate([QUESTION], max_new_tokens=8, **GREEDY).token_ids
    with pipe.prefill([QUESTION]) as session:
        ids = session.generate(max_new_tokens=4, **GREEDY).token_ids
        for prompt in ("x " * 500, [], [7, 8], [{"role": "user"}]):
            with pytest.raises(UsageError):
                session.append(prompt)
        ids += session.generate(max_new_tokens=4, **GREEDY).token_ids
        assert ids == whole
        session.append([FOLLOW_UP])
        assert_equals_fresh(session, pipe, [QUESTION, assistant(decode(name, whole)), FOLLOW_UP])


@unaligned
def test_messages_cannot_be_appended_to_ids(name: str, recorded_pipeline: PipelineOf):
    with recorded_pipeline(name).prefill(IDS) as session:
        for prompt in ("Hello", [FOLLOW_UP]):
            with pytest.raises(UsageError, match="token ids"):
                session.append(prompt)


@unaligned
def test_a_session_that_overflowed_leaves_no_nan_to_the_next(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    expected = pipe.generate(input_ids=IDS, max_new_tokens=8, **GREEDY).token_ids
    pool = pipe.receiver.pool
    with pipe.prefill(LONG_IDS) as session:
        slot = session.slot
        rows = pool.take_rows(pool.names, slot, 140, 150)
        pool.put_rows(slot, 140, {cache: np.full_like(values, np.nan) for cache, values in rows.items()})
        with pytest.raises(C2CError, match="nan"):
            session.generate(max_new_tokens=2, **GREEDY)
    assert all(np.isfinite(rows).all() for rows in pool.take_rows(pool.names, slot, 0, 152).values())
    with pipe.prefill(IDS) as session:
        assert session.slot == slot
        assert session.generate(max_new_tokens=8, **GREEDY).token_ids == expected
