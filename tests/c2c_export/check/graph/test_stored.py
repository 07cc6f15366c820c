"""What is read of integer operands is what ONNX Runtime multiplies with and looks up."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tiny_models import graph_session

from c2c_export.check.graph.stored import (
    UnreadableConstant,
    is_constant,
    read_constant,
    read_product_blocks,
    read_table_blocks,
)
from engines.ort.quantize import quantize_for_cpu
from engines.quantize import quantize_weights

Floats = NDArray[np.float32]
RANDOM = np.random.default_rng(0)


def graph_of(node: onnx.NodeProto, inputs: dict[str, tuple[int, list[int | str]]], table: Floats) -> ir.Model:
    """A graph of one node that reads `table` by the name of "weight"."""
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(table, "weight")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def product_of(weight: Floats) -> ir.Model:
    """x [B,S,K] times `weight` [K,N]."""
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    model = graph_of(node, {"x": (TensorProto.FLOAT, ["B", "S", weight.shape[0]])}, weight)
    model.graph.outputs[0].shape = ir.Shape(["B", "S", weight.shape[1]])
    return model


def run(model: ir.Model, **inputs: NDArray[np.generic]) -> Floats:
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    (result,) = graph_session(proto).run(None, inputs)
    return result


def only(model: ir.Model, op_type: str) -> ir.Node:
    (node,) = (node for node in model.graph if node.op_type == op_type)
    return node


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("num_rows", [32, 96, 100])
def test_a_products_blocks_are_what_onnx_runtime_multiplies_with(bits: str, num_rows: int) -> None:
    model = product_of(RANDOM.normal(size=(num_rows, 7)).astype(np.float32))
    quantize_for_cpu(model, bits)  # type: ignore[arg-type]
    one_row_each = np.eye(num_rows, dtype=np.float32)[None]
    multiplied = run(model, x=one_row_each)[0]  # [K,N]
    stored = read_product_blocks(only(model, "MatMulNBits"))
    np.testing.assert_allclose(stored.numbers, multiplied.T, rtol=1e-5, atol=1e-6)


def test_the_offsets_of_a_product_are_added_to_its_weights() -> None:
    # Four bits hold these exactly but for their zero points, so that offsets are worth their rows.
    steps, scales = RANDOM.integers(0, 16, (4, 32, 5)), RANDOM.uniform(0.1, 0.2, (4, 1, 5))
    weight = (steps * scales - 1.3).reshape(128, 5).astype(np.float32)
    model = product_of(weight)
    assert quantize_for_cpu(model, "int4").with_offsets == 1
    multiplied = run(model, x=np.eye(128, dtype=np.float32)[None])[0]
    stored = read_product_blocks(only(model, "MatMulNBits"))
    assert stored.numbers.shape == (5, 128)
    np.testing.assert_allclose(stored.numbers, multiplied.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stored.numbers, weight.T, atol=0.01)


@pytest.mark.parametrize("width", [32, 72])
def test_a_tables_blocks_are_what_onnx_runtime_looks_up(width: int) -> None:
    table = RANDOM.normal(size=(11, width)).astype(np.float32)
    node = helper.make_node("Gather", ["weight", "input_ids"], ["y"], axis=0)
    model = graph_of(node, {"input_ids": (TensorProto.INT64, ["N"])}, table)
    quantize_for_cpu(model, "int4")
    looked_up = run(model, input_ids=np.arange(11))
    stored = read_table_blocks(only(model, "GatherBlockQuantized"))
    np.testing.assert_allclose(stored.numbers, looked_up, rtol=1e-6)


def test_a_table_in_the_heads_blocks_is_what_onnx_runtime_looks_up() -> None:
    table = RANDOM.normal(size=(11, 64)).astype(np.float32)
    node = helper.make_node("Gather", ["weight", "input_ids"], ["y"], axis=0)
    model = graph_of(node, {"input_ids": (TensorProto.INT64, ["N"])}, table)
    quantize_for_cpu(model, "int8")
    lookup = only(model, "GatherBlockQuantized")
    for operand, shape in ((0, (11, 2, 32)), (2, (11, 2, 1)), (3, (11, 2, 1))):
        value = lookup.inputs[operand]
        assert value is not None
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy().reshape(shape), name=value.name)
        value.shape = value.const_value.shape
    lookup.attributes["quantize_axis"] = ir.AttrInt64("quantize_axis", 2)
    model.graph.outputs[0].shape = ir.Shape(["N", 2, 32])
    looked_up = run(model, input_ids=np.arange(11))
    assert looked_up.shape == (11, 2, 32)
    np.testing.assert_allclose(read_table_blocks(lookup).numbers, looked_up.reshape(11, 64), rtol=1e-6)


@pytest.mark.parametrize(("precision", "num_rows"), [("int8", 48), ("int4", 128), ("int4", 48)])
def test_a_dequantised_matrix_is_what_onnx_runtime_multiplies_with(precision: str, num_rows: int) -> None:
    model = product_of(RANDOM.normal(size=(num_rows, 6)).astype(np.float32))
    quantize_weights(model, precision)  # type: ignore[arg-type]
    multiplied = run(model, x=np.eye(num_rows, dtype=np.float32)[None])[0]
    stored = read_constant(only(model, "MatMul").inputs[1])
    assert stored is not None
    np.testing.assert_allclose(stored.numbers, multiplied, rtol=1e-6, atol=1e-6)  # ONNX Runtime sums in another order
    assert stored.blocks is not None
    np.testing.assert_allclose(stored.blocks.numbers(), multiplied.T, rtol=1e-6, atol=1e-6)


def test_what_is_computed_from_inputs_is_no_constant() -> None:
    model = product_of(np.ones((4, 3), dtype=np.float32))
    node = only(model, "MatMul")
    assert not is_constant(node.inputs[0])
    assert read_constant(node.inputs[0]) is None
    assert is_constant(node.inputs[1])


def test_a_product_whose_operands_are_too_small_is_told() -> None:
    model = product_of(RANDOM.normal(size=(64, 4)).astype(np.float32))
    quantize_for_cpu(model, "int8")
    node = only(model, "MatMulNBits")
    node.attributes["N"] = ir.AttrInt64("N", 5)
    with pytest.raises(UnreadableConstant, match=r"an operand has 256 elements, expected 5 times 64"):
        read_product_blocks(node)
