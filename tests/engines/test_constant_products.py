"""The LM head is found from the logits back, whatever scales them and in whichever order."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from c2c_export.errors import C2CError
from engines.constant_products import constant_products, lm_head

HEAD = helper.make_node("MatMul", ["x", "w"], ["y"], name="head")
SCALE = helper.make_tensor("scale", TensorProto.FLOAT, [], [30.0])
CONSTANT = helper.make_node("Constant", [], ["constant"], value=SCALE)

AROUND = {
    "nothing": [helper.make_node("Identity", ["y"], ["logits"])],
    "a scale behind": [helper.make_node("Mul", ["y", "scale"], ["logits"])],
    "a scale before": [helper.make_node("Mul", ["scale", "y"], ["logits"])],
    "a constant node before": [CONSTANT, helper.make_node("Mul", ["constant", "y"], ["logits"])],
    "a softcap": [
        helper.make_node("Div", ["y", "scale"], ["small"]),
        helper.make_node("Tanh", ["small"], ["capped"]),
        helper.make_node("Mul", ["scale", "capped"], ["logits"]),
    ],
}


def make_graph(nodes: list[onnx.NodeProto], output: str = "logits") -> ir.Graph:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4])]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["B", 6])]
    initializers = [numpy_helper.from_array(np.ones((4, 6), dtype=np.float32), "w"), SCALE]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)).graph


@pytest.mark.parametrize("around", AROUND)
def test_the_head_is_found_behind_what_scales_its_logits(around: str):
    head = lm_head(make_graph([HEAD, *AROUND[around]]))
    assert head is not None
    assert head.name == "head"


def test_a_graph_without_logits_has_no_head():
    assert lm_head(make_graph([HEAD], "y")) is None


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Identity", ["x"], ["logits"])],
        [HEAD, helper.make_node("Neg", ["x"], ["z"]), helper.make_node("Add", ["y", "z"], ["logits"])],
        [HEAD, helper.make_node("Mul", ["y", "x"], ["logits"])],
    ],
    ids=["no product", "a sum", "an input"],
)
def test_logits_that_are_no_products_are_refused(nodes: list[onnx.NodeProto]):
    with pytest.raises(C2CError, match="the graph's logits are not those of a product with the LM head"):
        lm_head(make_graph(nodes))


@pytest.mark.parametrize(
    ("perm", "transposed"), [(None, [True]), ([1, 0], [True]), ([0, 1], [])], ids=["reversed", "exchanged", "kept"]
)
def test_only_what_exchanges_dimensions_is_a_transposition(perm: list[int] | None, transposed: list[bool]):
    attributes = {} if perm is None else {"perm": perm}
    nodes = [helper.make_node("Transpose", ["w"], ["v"], **attributes), helper.make_node("MatMul", ["x", "v"], ["y"])]
    assert [product.transposed for product in constant_products(make_graph(nodes, "y"))] == transposed
