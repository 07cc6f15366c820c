"""The traced decoder against transformers: the same caches and logits, whichever way the prompt is cut into calls.

The oracle is transformers in float32 with eager attention over the *padded* prompt: one column per position, padding
columns masked. The graph gets the real tokens alone, with their gapped positions.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import CAPACITY, CONFIGS, SLIDING, VOCAB, WINDOW, TracedModel, build_model, graph_session, traced_model
from transformers import DynamicCache, LlamaConfig, MistralConfig, PreTrainedModel

from c2c_export.trace.decoder import sliding_window_of

TOLERANCE = 1e-4
GARBAGE = 50.0
CONTIGUOUS = list(range(13))
GAPPED = [0, 1, 2, 6, 7, 8, 9, 13, 14, 20, 21, 22]

Ints = NDArray[np.int64]


class Caches:
    """The graph with its caches, filled with garbage at first: whatever is read before it is written shows."""

    def __init__(self, traced: TracedModel, batch: int = 1) -> None:
        self.session = graph_session(traced.passed)
        self.window = sliding_window_of(traced.model.config) is not None
        self.cache = {
            spec.name.removeprefix("past_"): np.full((batch, *spec.shape[1:]), GARBAGE, dtype=np.float32)
            for spec in self.session.get_inputs()
            if spec.name.startswith("past_")
        }
        self.row_position_ids = np.full((batch, CAPACITY), -1000, dtype=np.int64)

    def run(self, ids: Ints, positions: Ints, write_index: Sequence[int], num_hidden: int = 0) -> NDArray[np.float32]:
        """Compute ids [B,S] at positions [B,S]; return the logits [B,V] of the last token."""
        batch, num_tokens = ids.shape
        start = np.array(write_index, dtype=np.int64)
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "write_index": start,
            "kv_length": start + num_tokens - num_hidden,
            "last_token": np.full(batch, num_tokens - 1, dtype=np.int64),
            **{f"past_{name}": cache for name, cache in self.cache.items()},
        }
        if self.window:
            for row, first in enumerate(start):
                self.row_position_ids[row, first : first + num_tokens] = positions[row]
            inputs["row_position_ids"] = self.row_position_ids
        names = [output.name for output in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(None, inputs), strict=True))
        self.cache = {name: outputs[name] for name in self.cache}
        assert outputs["logits"].shape == (batch, 1, VOCAB)
        return outputs["logits"][:, 0]


def oracle(
    model: PreTrainedModel, ids: Sequence[int], positions: Sequence[int], padding: Sequence[int] = ()
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """transformers over the padded prompt: logits [n,V] and caches [H,n,D] at `positions`.

    `positions` that are also in `padding` are computed, but never attended to.
    """
    length = max(positions) + 1
    padded = torch.full((1, length), 7)
    padded[0, list(positions)] = torch.tensor(list(ids))
    mask = torch.zeros(1, length, dtype=torch.int64)
    mask[0, [position for position in positions if position not in padding]] = 1
    with torch.no_grad():
        # without the config, so that sliding layers keep all their rows
        output = model(
            input_ids=padded,
            attention_mask=mask,
            position_ids=torch.arange(length)[None],
            past_key_values=DynamicCache(),
            use_cache=True,
        )
    caches = {}
    for number, layer in enumerate(output.past_key_values.layers):
        for kind, tensor in (("key", layer.keys), ("value", layer.values)):
            caches[f"{kind}.{number}"] = tensor[0][:, list(positions)].numpy()
    return output.logits[0, list(positions)].numpy(), caches


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(8, VOCAB, count).tolist()


def as_row(values: Sequence[int]) -> Ints:
    return np.array([values], dtype=np.int64)


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def assert_rows(caches: Caches, expected: dict[str, NDArray[np.float32]], request_row: int = 0) -> None:
    assert caches.cache.keys() == expected.keys()
    for name, rows in expected.items():
        count = rows.shape[1]
        assert_close(caches.cache[name][request_row][:, :count], rows)
        assert (caches.cache[name][request_row][:, count:] == GARBAGE).all()


@pytest.fixture(scope="module", params=CONFIGS)
def traced(request: pytest.FixtureRequest) -> TracedModel:
    return traced_model(request.param)


@pytest.mark.parametrize("positions", [CONTIGUOUS, GAPPED], ids=["contiguous", "gapped"])
@pytest.mark.parametrize("cuts", [[], [4], [3, 4, 11], "every"], ids=["one_call", "two_chunks", "four_chunks", "steps"])
def test_however_a_prompt_is_cut_into_calls_the_caches_and_logits_are_those_of_transformers(
    traced: TracedModel, positions: list[int], cuts: list[int] | str
) -> None:
    ids = random_ids(len(positions))
    expected_logits, expected_caches = oracle(traced.model, ids, positions)
    bounds = list(range(len(ids) + 1)) if isinstance(cuts, str) else [0, *cuts, len(ids)]
    caches = Caches(traced)
    for start, stop in itertools.pairwise(bounds):
        logits = caches.run(as_row(ids[start:stop]), as_row(positions[start:stop]), [start])
        assert_close(logits[0], expected_logits[stop - 1])
    assert_rows(caches, expected_caches)


def test_a_full_cache_is_computed_exactly(traced: TracedModel) -> None:
    ids, positions = random_ids(CAPACITY), list(range(CAPACITY))
    expected_logits, expected_caches = oracle(traced.model, ids, positions)
    caches = Caches(traced)
    caches.run(as_row(ids[:-1]), as_row(positions[:-1]), [0])
    assert_close(caches.run(as_row(ids[-1:]), as_row(positions[-1:]), [CAPACITY - 1])[0], expected_logits[-1])
    assert_rows(caches, expected_caches)


def test_a_closing_padding_row_sees_the_prompt_but_is_seen_by_nobody_not_even_itself(traced: TracedModel) -> None:
    prompt, pad, following = random_ids(9), 3, [11, 12]
    positions = [0, 1, 2, 3, 6, 7, 8, 9, 10]
    expected_logits, expected_caches = oracle(
        traced.model, [*prompt, pad, *following], [*positions, 14, 15, 16], padding=[14]
    )
    together, alone = Caches(traced), Caches(traced)
    # in the prompt's own call, and in one of its own, where kv_length equals write_index
    logits = together.run(as_row([*prompt, pad]), as_row([*positions, 14]), [0], num_hidden=1)
    alone.run(as_row(prompt), as_row(positions), [0])
    for found in (logits, alone.run(as_row([pad]), as_row([14]), [9], num_hidden=1)):
        assert_close(found[0], expected_logits[9])
    real = {name: np.delete(rows, 9, axis=1) for name, rows in expected_caches.items()}
    for caches in (together, alone):
        for offset, token in enumerate(following):
            logits = caches.run(as_row([token]), as_row([15 + offset]), [9 + offset])
            assert_close(logits[0], expected_logits[10 + offset])
        assert_rows(caches, real)


def test_requests_of_different_lengths_decode_together(traced: TracedModel) -> None:
    prompts = [random_ids(11, seed=1), random_ids(4, seed=2)]
    positions = [[*range(5), *range(8, 14)], [0, 1, 3, 4]]
    pool = Caches(traced, batch=2)
    for row, (ids, where) in enumerate(zip(prompts, positions, strict=True)):
        one = Caches(traced)
        one.run(as_row(ids), as_row(where), [0])
        for name in pool.cache:
            pool.cache[name][row] = one.cache[name][0]
        pool.row_position_ids[row] = one.row_position_ids[0]
    logits = pool.run(np.array([[20], [30]]), np.array([[17], [5]]), [11, 4])
    for row, (token, position) in enumerate(((20, 17), (30, 5))):
        expected_logits, expected_caches = oracle(traced.model, [*prompts[row], token], [*positions[row], position])
        assert_close(logits[row], expected_logits[-1])
        assert_rows(pool, expected_caches, request_row=row)


def test_logits_are_those_of_the_token_that_last_token_names(traced: TracedModel) -> None:
    ids = [random_ids(6, seed=3), random_ids(6, seed=4)]
    session = graph_session(traced.passed)
    inputs = {
        "input_ids": np.array(ids),
        "position_ids": np.tile(np.arange(6), (2, 1)),
        "write_index": np.zeros(2, dtype=np.int64),
        "kv_length": np.full(2, 6),
        "last_token": np.array([2, 5]),
        "row_position_ids": np.tile(np.arange(CAPACITY), (2, 1)),
    }
    feeds = {}
    for spec in session.get_inputs():
        feeds[spec.name] = inputs[spec.name] if spec.name in inputs else np.zeros((2, *spec.shape[1:]), np.float32)
    logits = session.run(["logits"], feeds)[0]
    for row, last in enumerate((2, 5)):
        assert_close(logits[row, 0], oracle(traced.model, ids[row], range(6))[0][last])


@pytest.mark.parametrize("name", SLIDING)
def test_these_prompts_are_longer_than_the_window(name: str) -> None:
    """Guards the tests above: with a wider window, the same weights give other numbers."""
    config = CONFIGS[name]()
    config.sliding_window = 100
    ids = random_ids(len(CONTIGUOUS))
    windowed, _ = oracle(build_model(CONFIGS[name]()), ids, CONTIGUOUS)
    unlimited, _ = oracle(build_model(config), ids, CONTIGUOUS)
    assert np.abs(windowed[-1] - unlimited[-1]).max() > 100 * TOLERANCE


def test_the_graph_holds_standard_operators_of_opset_24_only(traced: TracedModel) -> None:
    proto = traced.passed
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import if opset.domain == ""] == [("", 24)]
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    operators = [node.op_type for node in proto.graph.node]
    layers = traced.model.config.num_hidden_layers
    assert operators.count("Attention") == layers
    assert operators.count("TensorScatter") == 2 * layers


def test_inputs_and_outputs_are_named_and_shaped_as_documented(traced: TracedModel) -> None:
    config = traced.model.config
    names = [f"{kind}.{layer}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    windowed = ["row_position_ids"] if sliding_window_of(config) else []
    inputs = {value.name: _shape(value) for value in traced.passed.graph.input}
    outputs = {value.name: _shape(value) for value in traced.passed.graph.output}
    assert list(inputs) == [
        "input_ids",
        "position_ids",
        "write_index",
        "kv_length",
        "last_token",
        *windowed,
        *(f"past_{name}" for name in names),
    ]
    assert list(outputs) == ["logits", *names]
    batch, tokens = inputs["input_ids"]
    assert isinstance(batch, str)
    assert isinstance(tokens, str)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in names:
        assert inputs[f"past_{name}"] == outputs[name] == [batch, config.num_key_value_heads, CAPACITY, head_dim]
    assert outputs["logits"] == [batch, 1, VOCAB]
    if windowed:
        assert inputs["row_position_ids"] == [batch, CAPACITY]


def test_tracing_leaves_the_model_as_it_was(traced: TracedModel) -> None:
    assert traced.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "expected"),
    [(name, WINDOW if name in SLIDING else None) for name in CONFIGS],
)
def test_the_window_is_that_of_the_layers_that_have_one(name: str, expected: int | None) -> None:
    assert sliding_window_of(CONFIGS[name]()) == expected


def test_a_window_that_the_architecture_ignores_is_ignored_here_too() -> None:
    # transformers keeps unknown fields of a config.json as attributes, and LlamaForCausalLM knows no window
    assert sliding_window_of(LlamaConfig(sliding_window=5)) is None
    assert sliding_window_of(MistralConfig(sliding_window=None)) is None
    assert sliding_window_of(MistralConfig(sliding_window=7)) == 7


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
