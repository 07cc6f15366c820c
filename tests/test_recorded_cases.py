"""Every recorded case of the reference implementation through the public API; tests/golden/README.md describes them."""

from collections.abc import Callable

import numpy as np
import pytest
from recorded_cases import CACHE_TOLERANCE, LOGITS_TOLERANCE, RECORDED, Array, Recorded, case_params, every_case

from runtime import C2CPipeline, Session

every_unaligned_case = pytest.mark.parametrize("case", case_params([case for case in RECORDED if not case.aligned]))
every_closed_case = pytest.mark.parametrize("case", case_params([c for c in RECORDED if c.folder == "gates_closed"]))

PipelineOf = Callable[[str], C2CPipeline]


def caches_of(session: Session, pipe: C2CPipeline) -> list[tuple[Array, Array]]:
    return [session.kv(layer) for layer in range(pipe.bundle.manifest.receiver.num_layers)]


def test_all_recorded_folders_are_here():
    assert {case.folder for case in RECORDED} == {
        "qwen3_from_qwen2",
        "qwen3_from_llama_aligned",
        "llama_from_gemma3_aligned",
        "two_sharers_parallel",
        "two_sharers_sequential",
        "gates_closed",
    }
    assert len(RECORDED) >= 20


@every_case
def test_receiver_reads_the_recorded_ids_at_the_recorded_positions(case: Recorded, recorded_pipeline: PipelineOf):
    with recorded_pipeline(case.folder).prefill(case.prompt) as session:
        real = case.real("receiver")
        assert session.token_ids.tolist() == case.array("receiver_ids")[real].tolist()
        assert session.position_ids.tolist() == np.flatnonzero(real).tolist()
        assert session.plan.num_positions == len(real)
        assert (session.plan.closing_padding_id is not None) == (not real[-1])


@every_case
def test_sharers_read_the_recorded_ids_at_the_recorded_positions(case: Recorded, recorded_pipeline: PipelineOf):
    with recorded_pipeline(case.folder).prefill(case.prompt) as session:
        assert sorted(session.plan.sharers) == list(range(case.num_sharers))
        ids = case.array("sharer_ids" if case.aligned else "receiver_ids")
        real = case.real("sharer")
        for tokens in session.plan.sharers.values():
            assert tokens.ids.tolist() == ids[real].tolist()
            assert tokens.position_ids.tolist() == np.flatnonzero(real).tolist()


@every_case
def test_sections_are_the_recorded_ones(case: Recorded, recorded_pipeline: PipelineOf):
    all_sharers = 2**case.num_sharers - 1
    with recorded_pipeline(case.folder).prefill(case.prompt) as session:
        sections = session.plan.sections
        assert [[s.stop - s.start, all_sharers if s.fused else -1] for s in sections] == case.sections
        assert [s.start for s in sections] == [0, *(s.stop for s in sections[:-1])]


@every_case
def test_fused_caches_are_the_recorded_ones(case: Recorded, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(case.folder)
    real = case.real("receiver")
    with pipe.prefill(case.prompt) as session:
        for layer, (key, value) in enumerate(caches_of(session, pipe)):
            for found, name in ((key, "fused_key"), (value, "fused_value")):
                expected = case.array(f"{name}.{layer}")[:, real]
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, expected, rtol=0, atol=CACHE_TOLERANCE, err_msg=f"{name}.{layer}")


@every_case
def test_prompt_logits_are_the_recorded_ones(case: Recorded, recorded_pipeline: PipelineOf):
    with recorded_pipeline(case.folder).prefill(case.prompt) as session:
        assert session.logits.dtype == np.float32
        expected = case.array("prefill_logits")
        np.testing.assert_allclose(session.logits, expected, rtol=0, atol=LOGITS_TOLERANCE)


@every_unaligned_case
def test_receiver_alone_has_the_recorded_logits(case: Recorded, recorded_pipeline: PipelineOf):
    # An aligned case was recorded with the padded prompt, which the receiver alone does not read.
    with recorded_pipeline(case.folder).prefill(case.prompt, fuse=False) as session:
        expected = case.array("receiver_only_logits")
        np.testing.assert_allclose(session.logits, expected, rtol=0, atol=LOGITS_TOLERANCE)


@every_case
def test_sixteen_greedy_tokens_are_the_recorded_ones(case: Recorded, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(case.folder)
    expected = case.array("generated").tolist()
    assert len(expected) == 16
    with pipe.prefill(case.prompt) as session:
        out = session.generate(max_new_tokens=16, ignore_eos=True)
    assert out.token_ids == expected
    assert out.finish_reason == "length"
    assert pipe.generate(**case.prompt_argument, max_new_tokens=16, ignore_eos=True).token_ids == expected


@every_case
def test_stream_gives_the_recorded_tokens_and_the_text_in_pieces(case: Recorded, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(case.folder)
    chunks = list(pipe.stream(**case.prompt_argument, max_new_tokens=16, ignore_eos=True))
    expected = case.array("generated").tolist()
    assert [token for chunk in chunks for token in chunk.token_ids] == expected
    assert [chunk.generation is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    generation = chunks[-1].generation
    assert generation is not None
    assert generation.token_ids == expected
    whole = pipe.generate(**case.prompt_argument, max_new_tokens=16, ignore_eos=True)
    assert "".join(chunk.text for chunk in chunks) == generation.text == whole.text


@every_closed_case
def test_closed_gates_equal_the_receiver_alone_bit_for_bit(case: Recorded, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(case.folder)
    with pipe.prefill(case.prompt) as fused, pipe.prefill(case.prompt, fuse=False) as alone:
        np.testing.assert_array_equal(fused.logits, alone.logits)
        for found, expected in zip(caches_of(fused, pipe), caches_of(alone, pipe), strict=True):
            np.testing.assert_array_equal(found, expected)
        options = {"max_new_tokens": 16, "ignore_eos": True}
        assert fused.generate(**options).token_ids == alone.generate(**options).token_ids


@every_closed_case
def test_closed_gates_leave_nothing_to_compute_in_the_bundle(case: Recorded, recorded_pipeline: PipelineOf):
    manifest = recorded_pipeline(case.folder).bundle.manifest
    assert [(sharer.sharer_graph, sharer.fuser_graph) for sharer in manifest.sharers] == [(None, None)]
    assert not any(link.key_gate_open or link.value_gate_open for sharer in manifest.sharers for link in sharer.links)
