"""A model's activation functions as its graph computes them, from the nodes that were traced from one module.

In: the nodes of an activation module. Out: the function's values at given points, computed with onnx's reference
implementation in float32, whatever the graph's precision is, so that they can be compared with torch's module.
"""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from c2c_export.check.graph.stored import is_constant, read_constant

_OPSET = 24


def evaluate(nodes: Sequence[ir.Node], points: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The function of one input that `nodes`, in order, compute, at `points`; None where they are no such function."""
    given = {value for node in nodes for value in node.outputs}
    read = {value for node in nodes for value in node.inputs if value is not None and value not in given}
    arguments = [value for value in read if not is_constant(value)]
    results = [
        value for value in given if value.is_graph_output() or any(use.node not in nodes for use in value.uses())
    ]
    if len(arguments) != 1 or len(results) != 1 or any(node.domain not in ("", "ai.onnx") for node in nodes):
        return None
    names = {value: f"v{number}" for number, value in enumerate([*read, *given])}
    constants = [
        onnx.numpy_helper.from_array(stored.numbers, names[value])
        for value in read
        if (stored := read_constant(value)) is not None
    ]
    graph = onnx.helper.make_graph(
        [_in_float32(node, names) for node in nodes],
        "activation",
        [onnx.helper.make_tensor_value_info(names[arguments[0]], onnx.TensorProto.FLOAT, points.shape)],
        [onnx.helper.make_tensor_value_info(names[results[0]], onnx.TensorProto.FLOAT, points.shape)],
        constants,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", _OPSET)])
    try:
        outputs: list[NDArray[np.float32]] = ReferenceEvaluator(model).run(None, {names[arguments[0]]: points})
    except Exception:  # whatever an operator's reference implementation raises for operands that it cannot take
        return None
    return outputs[0]


def _in_float32(node: ir.Node, names: dict[ir.Value, str]) -> onnx.NodeProto:
    """The node by itself; a cast to another precision becomes nothing."""
    inputs = ["" if value is None else names[value] for value in node.inputs]
    outputs = [names[value] for value in node.outputs]
    if node.op_type == "Cast":
        return onnx.helper.make_node("Identity", inputs, outputs)
    proto = ir.to_proto(node)
    proto.ClearField("input")
    proto.ClearField("output")
    proto.input.extend(inputs)
    proto.output.extend(outputs)
    return proto
