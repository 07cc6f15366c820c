"""Every rotation is found, of queries and of keys in each layer, and the fused graph computes the same."""

import numpy as np
import onnx_ir as ir
import pytest
from tiny_models import CONFIGS, decoder_inputs, run_graph, traced_model

from c2c_export.passes.fuse_rotary import fuse_rotary


@pytest.mark.parametrize("name", CONFIGS)
def test_two_rotations_per_layer_are_fused_and_the_numbers_stay(name: str) -> None:
    traced = traced_model(name)
    graph = ir.from_proto(traced.traced)
    expected_count = 2 * traced.model.config.num_hidden_layers
    assert fuse_rotary(graph) == traced.counts["fuse_rotary"] == expected_count
    assert [node.op_type for node in graph.graph].count("RotaryEmbedding") == expected_count
    inputs = decoder_inputs(traced.traced)
    expected, found = run_graph(traced.traced, inputs), run_graph(ir.to_proto(graph), inputs)
    for output, values in expected.items():
        np.testing.assert_allclose(found[output], values, rtol=0, atol=1e-5)
    assert fuse_rotary(graph) == 0
