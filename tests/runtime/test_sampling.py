"""Sampling against transformers' own chain of logits processors, and the draws against their distribution."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from c2c_export.errors import C2CError, UsageError
from runtime.sampling import Sampler, SamplingParams, process_logits

_MODEL = LlamaForCausalLM(
    LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
)


def _process_with_transformers(logits: np.ndarray, token_ids: list[int], params: SamplingParams) -> np.ndarray:
    config = GenerationConfig(
        do_sample=not params.greedy,
        temperature=1.0 if params.temperature is None else float(params.temperature),
        top_k=params.top_k or 0,
        top_p=1.0 if params.top_p is None else params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
    )
    processors = _MODEL._get_logits_processor(config, input_ids_seq_length=max(1, len(token_ids)))
    return processors(torch.tensor([token_ids], dtype=torch.long), torch.from_numpy(logits[None].copy()))[0].numpy()


_FRACTIONS = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
_PARAMS = st.builds(
    SamplingParams,
    temperature=st.one_of(st.none(), st.sampled_from([0, 1, 1.0]), st.floats(0.05, 20)),
    top_k=st.one_of(st.none(), st.integers(0, 30)),
    top_p=_FRACTIONS,
    min_p=_FRACTIONS,
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.2, 5)),
)
# the coarse values make equal logits, on which top-k and top-p are decided by their rules for ties
_LOGITS = st.lists(st.one_of(st.floats(-30, 30, width=32), st.sampled_from([-2.0, 0.0, 1.5])), min_size=1, max_size=24)


@settings(deadline=None, max_examples=300)
@given(logits=_LOGITS, token_ids=st.lists(st.integers(0, 30), max_size=12), params=_PARAMS)
def test_process_logits_equals_transformers_processors(logits, token_ids, params):
    array = np.array(logits, dtype=np.float32)
    before = array.copy()
    processed = process_logits(array, token_ids, params)
    expected = _process_with_transformers(array, token_ids, params)
    assert processed.dtype == np.float32
    np.testing.assert_array_equal(array, before)
    both = np.isfinite(processed) & np.isfinite(expected)
    np.testing.assert_array_equal(processed[both], expected[both])
    if not np.array_equal(np.sort(processed), np.sort(expected)):
        # the two softmaxes differ in the last bit: only a threshold hit that closely may fall differently
        assert params.top_p is not None or params.min_p is not None
        kept = [np.count_nonzero(np.isfinite(process_logits(array, token_ids, _shifted(params, by)))) for by in (-1, 1)]
        assert kept[0] <= np.count_nonzero(np.isfinite(expected)) <= kept[1]
        assert kept[0] < kept[1]
    elif not np.array_equal(processed, expected):
        # torch's sort is unstable: of equal logits that top-p cuts through, as many are kept, but perhaps others
        assert params.top_p is not None
        differ = processed != expected
        assert len({*processed[differ], *expected[differ]} - {-np.inf}) == 1


def _shifted(params: SamplingParams, by: int) -> SamplingParams:
    """Slightly stricter (by=-1) or laxer (by=1) thresholds."""
    top_p = None if params.top_p is None else min(1.0, max(0.0, params.top_p + by * 1e-6))
    min_p = None if params.min_p is None else min(1.0, params.min_p * (1 - by * 1e-5))
    return replace(params, top_p=top_p, min_p=min_p)


@pytest.mark.parametrize(
    ("logits", "params"),
    [
        ([1, 1, 1, 1], SamplingParams(top_p=0.5)),
        ([1, 1, 1], SamplingParams(top_p=2 / 3)),
        ([2, 0, 2, 0, 2], SamplingParams(top_p=0.6)),
        ([2, 3, 2, 3, 2, 0], SamplingParams(top_k=3)),
        ([2, 3, 2, 3, 2, 0], SamplingParams(top_k=4, top_p=0.9)),
        ([3, 3, 1], SamplingParams(min_p=1.0)),
        ([3, 3, 1], SamplingParams(top_p=0.0)),
        ([0, 0, 0], SamplingParams(temperature=0.3, repetition_penalty=1.7)),
    ],
)
def test_equal_logits_at_a_threshold_are_kept_as_transformers_keeps_them(logits, params):
    array = np.array(logits, dtype=np.float32)
    np.testing.assert_array_equal(
        process_logits(array, [0, 2], params), _process_with_transformers(array, [0, 2], params)
    )


def test_large_vocabulary_equals_transformers_processors():
    generator = np.random.default_rng(0)
    params = SamplingParams(temperature=0.7, top_k=200, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    logits = (generator.standard_normal(50_000) * 3).astype(np.float32)
    token_ids = generator.integers(0, 50_000, 500).tolist()
    for variant in (params, replace(params, top_k=None, min_p=None), replace(params, top_k=None, top_p=None)):
        processed = process_logits(logits, np.array(token_ids), variant)
        np.testing.assert_array_equal(processed, _process_with_transformers(logits, token_ids, variant))
        assert np.isfinite(processed).sum() < 50_000


@pytest.mark.parametrize(
    ("params", "greedy"),
    [
        (SamplingParams(), True),
        (SamplingParams(temperature=0), True),
        (SamplingParams(temperature=0.0, top_k=5, top_p=0.9, min_p=0.1), True),
        (SamplingParams(top_k=0), True),
        (SamplingParams(seed=3, repetition_penalty=1.1), True),
        (SamplingParams(temperature=0.5), False),
        (SamplingParams(top_k=5), False),
        (SamplingParams(top_p=0.9), False),
        (SamplingParams(min_p=0.1), False),
    ],
)
def test_greedy_unless_a_temperature_or_a_filter_is_given(params, greedy):
    assert params.greedy is greedy


def test_greedy_takes_the_first_maximum_after_the_repetition_penalty():
    logits = np.array([1, 4, 4, 3], dtype=np.float32)
    assert Sampler(SamplingParams()).sample(logits, [1]) == 1
    assert Sampler(SamplingParams(repetition_penalty=2.0)).sample(logits, [1]) == 2
    assert Sampler(SamplingParams(temperature=0, repetition_penalty=2.0, top_k=1)).sample(logits, [1, 2]) == 3


def test_draws_follow_the_softmax_of_the_processed_logits():
    logits = np.array([0.5, -1.0, 2.0, 1.0, -40.0, 0.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=1.3, top_k=5, top_p=0.9, repetition_penalty=1.5, seed=11))
    expected = torch.softmax(torch.from_numpy(_process_with_transformers(logits, [2], sampler.params)), 0).numpy()
    assert (expected == 0).sum() == 2
    num_draws = 20_000
    counts = np.bincount([sampler.sample(logits, [2]) for _ in range(num_draws)], minlength=6)
    deviation = np.abs(counts / num_draws - expected)
    assert (deviation <= 5 * np.sqrt(expected * (1 - expected) / num_draws)).all()


def test_same_seed_draws_alike_and_another_seed_or_none_differs():
    logits = np.zeros(1000, dtype=np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.sample(logits, []) for _ in range(20)]

    assert draw(5) == draw(5)
    assert len({tuple(draw(5)), tuple(draw(6)), tuple(draw(None)), tuple(draw(None))}) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, 1e-40, "1", True, False, [1.0])),
        *(("top_k", value) for value in (-1, 2.0, math.nan, "5", True)),
        *((field, value) for field in ("top_p", "min_p") for value in (-0.01, 1.01, math.nan, "0.5", True)),
        *(("repetition_penalty", value) for value in (0, -1.0, math.nan, math.inf, None, "1.1", True)),
        *(("seed", value) for value in (-1, 1.5, "7", False)),
    ],
)
def test_a_wrong_parameter_is_refused_by_field_and_value(field, value):
    with pytest.raises(UsageError, match=f"^{field}: ") as error:
        SamplingParams(**{field: value})
    assert repr(value) in str(error.value)
    assert "expected" in str(error.value)


def test_numpy_numbers_are_accepted():
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.5), seed=np.int32(1))
    assert not params.greedy


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)])
@pytest.mark.parametrize("bad", [[1, math.nan, 2], [1, math.inf, 2], [-math.inf] * 3])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_logits_of_an_overflowed_engine_are_refused(params, bad):
    with pytest.raises(C2CError, match="logits"):
        Sampler(params).sample(np.array(bad, dtype=np.float32), [])


def test_negative_token_ids_are_refused():
    with pytest.raises(UsageError, match="-1 is negative"):
        process_logits(np.zeros(4, dtype=np.float32), [0, -1], SamplingParams(repetition_penalty=1.1))
