"""Nodes, weights and inputs on which no output depends go; all others stay."""

import onnx
import onnx_ir as ir

from c2c_export.passes.remove_unused import remove_unused


def make_graph() -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 24]>\n'
            "agraph (float[2] x, float[2] unread, float[2] passed_on) => (float[2] y, float[2] passed_on)\n"
            "<float[2] used = {1.0, 2.0}, float[2] dead_weight = {3.0, 4.0}> {\n"
            "  y = Add (x, used)\n  dead = Mul (unread, dead_weight)\n  deader = Neg (dead)\n}"
        )
    )


def test_dead_nodes_weights_and_inputs_are_removed_and_counted() -> None:
    graph = make_graph()
    assert remove_unused(graph) == 3  # two nodes and the input that they read
    assert [node.op_type for node in graph.graph] == ["Add"]
    assert list(graph.graph.initializers) == ["used"]
    # an input that is an output is needed, though no node reads it
    assert [spec.name for spec in graph.graph.inputs] == ["x", "passed_on"]
    assert [spec.name for spec in graph.graph.outputs] == ["y", "passed_on"]


def test_a_graph_without_unused_parts_stays_as_it_is() -> None:
    graph = make_graph()
    remove_unused(graph)
    assert remove_unused(graph) == 0
