"""What several nodes compute alike is computed once; the numbers stay equal to the last bit."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_models import CONFIGS, decoder_inputs, run_graph, traced_model

from c2c_export.passes import RECEIVER_PASSES
from c2c_export.passes.share_equal_nodes import share_equal_nodes


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_angles_are_computed_once_per_base(name: str) -> None:
    operators = Counter(node.op_type for node in traced_model(name).passed.graph.node)
    num_bases = 2 if name == "gemma3" else 1
    assert (operators["Cos"], operators["Sin"]) == (num_bases, num_bases)


@pytest.mark.parametrize("name", ["qwen3_wide_heads", "gemma3"])
def test_sharing_changes_no_bit(name: str) -> None:
    traced = traced_model(name)
    graph = ir.from_proto(traced.traced)
    for pass_name, apply in RECEIVER_PASSES[:2]:
        assert apply(graph) == traced.counts[pass_name]
    before, num_nodes = ir.to_proto(graph), len(graph.graph)
    assert share_equal_nodes(graph) == num_nodes - len(graph.graph) == traced.counts["share_equal_nodes"] > 0
    inputs = decoder_inputs(before)
    expected, found = run_graph(before, inputs), run_graph(ir.to_proto(graph), inputs)
    for output, values in expected.items():
        np.testing.assert_array_equal(found[output], values)


def test_equal_nodes_are_merged_and_others_are_not() -> None:
    graph = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 24]>\n'
            "agraph (float[2] x, float[2] y) => (float[2] sum, float[2] other) {\n"
            "  a = Cos (x)\n  b = Cos (x)\n  c = Cos (y)\n  sum = Add (a, b)\n  other = Sub (a, c)\n}"
        )
    )
    assert share_equal_nodes(graph) == 1
    assert sorted(node.op_type for node in graph.graph) == ["Add", "Cos", "Cos", "Sub"]
    assert [output.name for output in graph.graph.outputs] == ["sum", "other"]
