"""Constant expressions are computed at compile time; what depends on an input stays."""

import numpy as np
import onnx
import onnx_ir as ir
from tiny_models import run_graph

from c2c_export.passes.fold_constants import fold_constants


def test_constant_expressions_go_and_the_numbers_stay() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 24]>\n'
        "agraph (float[2,3] x) => (float[2,1] y) {\n"
        "  axis = Constant <value_int: int = -1> ()\n  shape = Constant <value_ints: ints = [1]> ()\n"
        "  axes = Reshape (axis, shape)\n  squared = Mul (x, x)\n  y = ReduceMean (squared, axes)\n}"
    )
    graph = ir.from_proto(proto)
    assert fold_constants(graph) > 0
    operators = [node.op_type for node in graph.graph if node.op_type != "Constant"]
    assert operators == ["Mul", "ReduceMean"]
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(run_graph(ir.to_proto(graph), {"x": x})["y"], (x * x).mean(axis=1, keepdims=True))
    assert fold_constants(graph) == 0
