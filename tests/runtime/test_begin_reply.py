"""Replies that a caller begins: what follows is what would follow if the model had generated them."""

from typing import Any

import numpy as np
import pytest
from recorded_pairs import ALIGNED, CLOSING_PADDING, UNALIGNED, PipelineOf, every, unaligned

from runtime import UsageError

QUESTION = {"role": "user", "content": "What is the capital of France?"}
FOLLOW_UP = {"role": "user", "content": "And of Spain?"}
GREEDY = {"ignore_eos": True}

every_kind = every(UNALIGNED, CLOSING_PADDING, ALIGNED)


@every_kind
@pytest.mark.parametrize("cuts", [[5], [2, 5], [1, 2]], ids=str)
def test_what_the_model_would_have_said_leads_to_the_same_rest(
    name: str, cuts: list[int], recorded_pipeline: PipelineOf
):
    pipe = recorded_pipeline(name)
    whole = pipe.generate([QUESTION], max_new_tokens=10, **GREEDY).token_ids
    with pipe.prefill([QUESTION]) as begun, pipe.prefill([QUESTION]) as generated:
        start = 0
        for cut in cuts:
            begun.begin_reply(whole[start:cut])
            start = cut
        assert begun.generate(max_new_tokens=10 - start, **GREEDY).token_ids == whole[start:]
        generated.generate(max_new_tokens=10, **GREEDY)
        assert begun.token_ids.tolist() == generated.token_ids.tolist()
        np.testing.assert_array_equal(begun.kv(0), generated.kv(0))
        for session in (begun, generated):
            session.append([FOLLOW_UP])
        assert begun.token_ids.tolist() == generated.token_ids.tolist()


@every_kind
def test_a_begun_reply_is_the_assistants_turn(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    with pipe.prefill([QUESTION]) as session:
        session.begin_reply("Paris, it is.")
        session.append([FOLLOW_UP])
        with pipe.prefill([QUESTION, {"role": "assistant", "content": "Paris, it is."}, FOLLOW_UP]) as fresh:
            assert session.token_ids.tolist() == fresh.token_ids.tolist()


@every_kind
def test_a_score_after_a_begun_reply_is_the_rest_of_the_score_of_both(name: str, recorded_pipeline: PipelineOf):
    with recorded_pipeline(name).prefill([QUESTION]) as session:
        both = session.score([9, 8, 7, 6])
        session.begin_reply([9, 8])
        assert session.score([7, 6]).log_probabilities == pytest.approx(both.log_probabilities[2:], abs=1e-6)


@unaligned
def test_a_running_stream_ends_where_a_reply_is_begun(name: str, recorded_pipeline: PipelineOf):
    with recorded_pipeline(name).prefill([QUESTION]) as session:
        stream = session.stream(max_new_tokens=4, **GREEDY)
        next(stream)
        session.begin_reply([7])
        with pytest.raises(UsageError, match="went on with another"):
            next(stream)


@unaligned
@pytest.mark.parametrize(("reply", "message"), [("", "no tokens"), ([512], "0 to 511"), ([7] * 250, "capacity of 256")])
def test_a_refused_reply_changes_nothing(name: str, reply: Any, message: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    with pipe.prefill([QUESTION]) as session:
        before = session.token_ids.tolist()
        with pytest.raises(UsageError, match=message):
            session.begin_reply(reply)
        assert session.token_ids.tolist() == before
        assert session.generate(max_new_tokens=3, **GREEDY).token_ids == (
            pipe.generate([QUESTION], max_new_tokens=3, **GREEDY).token_ids
        )
