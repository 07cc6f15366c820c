"""A trained decoder against the portable graph of the same model, which other tests compare with transformers."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import CAPACITY, CONFIGS, VOCAB, TracedModel, build_model, run_graph, traced_model

from c2c_export.check.trained.decoder import TrainedDecoder

TOLERANCE = 1e-4
# three requests: how many rows each has, and the position of each row, the new ones included
STARTS = [0, 5, 9]
POSITIONS = [[0, 1, 2, 3], [0, 1, 2, 6, 7, 9, 10, 11, 14], [2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 20, 21]]
NUM_TOKENS = 4

Inputs = dict[str, NDArray[np.generic]]


@dataclasses.dataclass(frozen=True)
class Both:
    """A model's portable graph and the trained side of it."""

    traced: TracedModel
    trained: TrainedDecoder

    def compare(self, inputs: Inputs) -> None:
        expected = run_graph(self.traced.passed, inputs)
        found = self.trained.run({spec.name: inputs[spec.name] for spec in self.traced.passed.graph.input})
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(found[name], array, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.fixture(scope="module", params=CONFIGS)
def both(request: pytest.FixtureRequest) -> Both:
    traced = traced_model(request.param)
    return Both(traced, TrainedDecoder(traced.model))


def make_inputs(traced: TracedModel, starts: list[int], positions: list[list[int]], num_tokens: int) -> Inputs:
    """Random tokens behind random rows; what lies behind the new rows is random too, and read by nobody."""
    random, batch = np.random.default_rng(3), len(starts)
    rows = np.full((batch, CAPACITY), -1000)
    for request, where in enumerate(positions):
        rows[request, : len(where)] = where
    start = np.array(starts)
    inputs: Inputs = {
        "input_ids": random.integers(0, VOCAB, (batch, num_tokens)),
        "position_ids": np.array([where[-num_tokens:] for where in positions]),
        "write_index": start,
        "kv_length": start + num_tokens,
        "last_token": np.full(batch, num_tokens - 1),
        "row_position_ids": rows,
    }
    for spec in traced.passed.graph.input:
        if spec.name.startswith("past_"):
            shape = [dim.dim_value for dim in spec.type.tensor_type.shape.dim[1:]]
            inputs[spec.name] = random.normal(size=(batch, *shape)).astype(np.float32)
    return inputs


def test_requests_with_rows_of_their_own_and_gapped_positions_give_what_the_graph_gives(both: Both) -> None:
    both.compare(make_inputs(both.traced, STARTS, POSITIONS, NUM_TOKENS))


def test_a_closing_padding_row_is_seen_by_nobody_not_even_itself(both: Both) -> None:
    inputs = make_inputs(both.traced, STARTS, POSITIONS, NUM_TOKENS)
    inputs["kv_length"] = inputs["kv_length"] - 1
    both.compare(inputs)


def test_a_closing_padding_row_alone_sees_all_rows_before_it(both: Both) -> None:
    inputs = make_inputs(both.traced, [8], [[*range(8), 9]], 1)
    inputs["kv_length"] = inputs["write_index"]
    both.compare(inputs)


def test_logits_are_those_of_last_token(both: Both) -> None:
    inputs = make_inputs(both.traced, STARTS, POSITIONS, NUM_TOKENS)
    inputs["last_token"] = np.array([0, 2, 1])
    both.compare(inputs)


def test_a_full_cache_gives_what_the_graph_gives(both: Both) -> None:
    both.compare(make_inputs(both.traced, [0], [list(range(CAPACITY))], CAPACITY))


def test_inputs_are_left_as_they_are(both: Both) -> None:
    inputs = make_inputs(both.traced, STARTS, POSITIONS, NUM_TOKENS)
    before = {name: array.copy() for name, array in inputs.items()}
    both.trained.run(inputs)
    for name, array in before.items():
        np.testing.assert_array_equal(inputs[name], array)


def test_holding_other_weights_computes_with_them_and_leaves_the_model_as_it_was(both: Both) -> None:
    inputs = make_inputs(both.traced, STARTS, POSITIONS, NUM_TOKENS)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = both.traced.model.state_dict()[name].numpy()
    turned = weight[::-1].astype(np.float16)
    held = both.trained.holding({name: turned})
    other = build_model(CONFIGS[_name_of(both)]())
    with torch.no_grad():
        other.get_parameter(name).copy_(torch.tensor(turned.astype(np.float32, order="C")))
    expected = TrainedDecoder(other).run(inputs)["logits"]
    np.testing.assert_allclose(held.run(inputs)["logits"], expected, rtol=0, atol=1e-6)
    assert np.abs(expected - both.trained.run(inputs)["logits"]).max() > 1e-2
    both.compare(inputs)


def test_tied_weights_are_replaced_one_by_one() -> None:
    traced = traced_model("gemma3")
    inputs = make_inputs(traced, STARTS, POSITIONS, NUM_TOKENS)
    head = traced.model.state_dict()["lm_head.weight"].numpy()
    trained = TrainedDecoder(traced.model)
    found, before = trained.holding({"lm_head.weight": 0 * head}).run(inputs), trained.run(inputs)
    assert not found["logits"].any()
    np.testing.assert_array_equal(found["key.1"], before["key.1"])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("model.norm.bias", (32,), "no such parameter"), ("model.norm.weight", (31,), r"the model's has shape \[32\]")],
)
def test_a_weight_that_the_model_does_not_have_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    trained = TrainedDecoder(traced_model("gemma3").model)
    with pytest.raises(ValueError, match=message):
        trained.holding({name: np.zeros(shape, dtype=np.float32)})


def test_rows_are_extended_in_pieces_as_in_one_call(both: Both) -> None:
    ids, positions = [5, 6, 7, 8, 9, 10], [0, 1, 2, 5, 6, 7]
    whole, expected = both.trained.extend(both.trained.no_rows(), ids, positions)
    rows = both.trained.no_rows()
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        rows, logits = both.trained.extend(rows, ids[start:stop], positions[start:stop])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    for found, wanted in zip((*rows.keys, *rows.values), (*whole.keys, *whole.values), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0, atol=TOLERANCE)
    assert rows.position_ids.tolist() == positions
    assert rows.without_last(2).position_ids.tolist() == positions[:4]
    assert rows.without_last(2).keys[0].shape[2] == 4


def _name_of(both: Both) -> str:
    return next(name for name in CONFIGS if traced_model(name) is both.traced)
