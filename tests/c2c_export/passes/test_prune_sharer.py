"""Pruning a sharer: exactly the caches that are read, and those below them, are left and unchanged in value."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_models import decoder_inputs, run_graph, traced_model

from c2c_export.passes import apply_passes, sharer_passes
from c2c_export.passes.prune_sharer import CacheName, prune_sharer

CACHES = {"input_ids", "position_ids", "write_index", "kv_length"}
BELOW = {"past_key.0", "past_value.0"}
# What is read of a model of two layers: the outputs that stay, and the inputs (row_position_ids apart)
CASES: dict[str, tuple[set[CacheName], list[str], set[str]]] = {
    "all": (
        {(0, "key"), (0, "value"), (1, "key"), (1, "value")},
        ["key.0", "value.0", "key.1", "value.1"],
        {*CACHES, *BELOW, "past_key.1", "past_value.1"},
    ),
    "top_key": ({(0, "key"), (1, "key")}, ["key.0", "value.0", "key.1"], {*CACHES, *BELOW, "past_key.1"}),
    "top_value": ({(1, "value")}, ["key.0", "value.0", "value.1"], {*CACHES, *BELOW, "past_value.1"}),
    "first_layer": (
        {(0, "key"), (0, "value")},
        ["key.0", "value.0"],
        {"input_ids", "position_ids", "write_index", *BELOW},
    ),
    "first_key": ({(0, "key")}, ["key.0"], {"input_ids", "position_ids", "write_index", "past_key.0"}),
    "first_value": ({(0, "value")}, ["value.0"], {"input_ids", "write_index", "past_value.0"}),
}
MODELS = ("llama_untied_biased", "qwen2_sliding_from_layer_1", "gemma3")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_the_caches_that_are_read_stay_and_keep_their_values(name: str, case: str) -> None:
    read, outputs, inputs = CASES[case]
    traced = traced_model(name).traced
    graph = ir.from_proto(traced)
    counts = apply_passes(graph, sharer_passes(frozenset(read)))
    pruned = ir.to_proto(graph)
    onnx.checker.check_model(pruned, full_check=True)
    assert [output.name for output in pruned.graph.output] == outputs
    assert {spec.name for spec in pruned.graph.input} - {"row_position_ids"} == inputs
    assert counts["prune_sharer"] == 5 - len(outputs)
    feeds = decoder_inputs(traced)
    expected, found = run_graph(traced, feeds), run_graph(pruned, feeds)
    for output in outputs:
        np.testing.assert_allclose(found[output], expected[output], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "case", "expected"),
    [
        ("qwen2_sliding_from_layer_1", "all", False),  # the top layer alone slides, and its attention is not computed
        ("gemma3", "top_key", True),
        ("gemma3", "first_layer", False),
    ],
)
def test_positions_of_rows_are_read_only_where_a_sliding_layer_attends(name: str, case: str, expected: bool) -> None:
    graph = ir.from_proto(traced_model(name).traced)
    prune_sharer(graph, frozenset(CASES[case][0]))
    assert ("row_position_ids" in {spec.name for spec in graph.graph.inputs}) is expected


def test_the_head_and_the_rest_of_the_top_layer_are_gone() -> None:
    traced = traced_model("llama_untied_biased").traced
    graph = ir.from_proto(traced)
    prune_sharer(graph, frozenset({(1, "key")}))
    pruned = ir.to_proto(graph)
    # hidden size 32, MLP 48, vocabulary 61, keys and values 16; matrices are stored either way round
    before, left = (
        Counter(tuple(sorted(weight.dims)) for weight in proto.graph.initializer) for proto in (traced, pruned)
    )
    assert before[(32, 61)] == 2  # embedding and head
    assert left[(32, 61)] == 1
    assert (before[(32, 48)], left[(32, 48)]) == (6, 3)  # the three matrices of an MLP
    assert (before[(32, 32)], left[(32, 32)]) == (4, 2)  # of queries and of the output
    assert (before[(16, 32)], left[(16, 32)]) == (4, 3)  # of keys and of values
    assert [node.op_type for node in pruned.graph.node].count("Attention") == 1
