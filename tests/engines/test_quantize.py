"""Weight-only quantisation against numpy, onnx's checker and reference evaluator, and TensorRT-RTX's builder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from c2c_export.errors import C2CError
from engines.precision import lower_precision
from engines.quantize import float_weights, quantize_blocks, quantize_columns, quantize_weights

Precision = Literal["int8", "int4"]
Array = np.ndarray[Any, Any]
GRAPHS = ("receiver", "sharer0", "fuser0")

both_precisions = pytest.mark.parametrize("precision", ["int8", "int4"])


def normal(*shape: int, scale: float = 0.05) -> Array:
    return np.random.default_rng(sum(shape)).normal(0, scale, shape).astype(np.float32)


def make_graph(weights: dict[str, Array], nodes: list[onnx.NodeProto], width: int, outputs: list[str]) -> ir.Model:
    """A graph from x [B,width], and ids [B], to `outputs`."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", width]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["B"]),
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in outputs]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, results, initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10))


def product(weight: Array) -> ir.Model:
    return make_graph({"w": weight}, [helper.make_node("MatMul", ["x", "w"], ["y"])], weight.shape[0], ["y"])


def tied_head(embedding: Array) -> ir.Model:
    """Embedding [V,K], read by id and, transposed, as the LM head."""
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["hidden"]),
        helper.make_node("Transpose", ["embedding"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    return make_graph({"embedding": embedding}, nodes, embedding.shape[1], ["logits", "hidden"])


def evaluate(model: ir.Model, **inputs: Array) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    unread = {"x": np.zeros((1, 1), np.float32), "ids": np.zeros(1, np.int64)}
    results: list[Array] = ReferenceEvaluator(proto).run(None, unread | inputs)
    return results


def dequantized_weight(model: ir.Model) -> Array:
    """What the product with the identity gives: the weight that the graph multiplies by."""
    width = model.graph.inputs[0].shape[1]
    return evaluate(model, x=np.eye(int(width), dtype=np.float32))[0]


def float_tensors(model: ir.Model) -> list[str]:
    return sorted(name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT)


# Weights of any size that float16 scales can hold, with zeros and repeated values.
any_weight = arrays(
    np.float32,
    st.tuples(st.sampled_from([16, 32, 48, 64, 128]), st.integers(1, 5)),
    elements=st.floats(-100, 100, width=32) | st.just(0.0) | st.floats(-(2.0**-20), 2.0**-20, width=32),
)


@settings(max_examples=60, deadline=None)
@given(any_weight)
def test_int8_is_within_half_a_step_of_every_weight(weight: Array):
    quantized = quantize_columns(weight)
    assert quantized.values.dtype == np.int8
    step = quantized.scales[np.newaxis]
    assert (step > 0).all()
    assert (np.abs(quantized.values * step - weight) <= step / 2 * (1 + 1e-4)).all()
    # No coarser than the column needs: its largest weight takes the largest integer, but for rounding up the scale.
    fine = np.abs(weight).max(axis=0) > 0.1
    assert (np.abs(quantized.values).max(axis=0)[fine] >= 126).all()


@settings(max_examples=60, deadline=None)
@given(any_weight)
def test_int4_is_within_half_a_step_of_every_weight_in_its_range(weight: Array):
    block_size = 64 if len(weight) % 64 == 0 else 16
    quantized = quantize_blocks(weight, block_size)
    assert quantized.scales.shape == (len(weight) // block_size, weight.shape[1])
    step = np.repeat(quantized.scales, block_size, axis=0)
    assert (step > 0).all()
    assert ((quantized.values >= -8) & (quantized.values <= 7)).all()
    nearest = np.clip(weight, -8 * step, 7 * step)
    assert (np.abs(quantized.values * step - nearest) <= step / 2 * (1 + 1e-4)).all()


def test_int4_scales_err_less_than_mapping_the_largest_weight_to_seven():
    weight = normal(256, 40)
    quantized = quantize_blocks(weight, 64)
    found = quantized.values * np.repeat(quantized.scales, 64, axis=0)
    step = np.repeat(np.abs(weight.reshape(4, 64, 40)).max(axis=1) / 7, 64, axis=0)
    plain = np.round(weight / step) * step
    assert np.square(found - weight).sum() < 0.9 * np.square(plain - weight).sum()


@both_precisions
def test_scales_are_positive_numbers_that_float16_holds(precision: Precision):
    weight = normal(64, 6)
    weight[:, 0] = 0
    weight[:, 1] = 1e-9
    model = product(weight)
    quantize_weights(model, precision)
    scales = model.graph.initializers[f"w.{precision}.scales"].const_value
    assert scales is not None
    assert (scales.numpy() > 0).all()
    np.testing.assert_array_equal(scales.numpy(), scales.numpy().astype(np.float16).astype(np.float32))
    assert np.isfinite(dequantized_weight(model)).all()


@pytest.mark.parametrize(
    ("precision", "num_rows", "attributes", "scales_shape"),
    [
        ("int8", 192, {"axis": 1}, [7]),
        ("int4", 192, {"axis": 0, "block_size": 64}, [3, 7]),
        ("int4", 96, {"axis": 0, "block_size": 32}, [3, 7]),
        ("int4", 48, {"axis": 0, "block_size": 16}, [3, 7]),
    ],
)
def test_weight_becomes_integers_and_a_standard_dequantize_linear(
    precision: Precision, num_rows: int, attributes: dict[str, int], scales_shape: list[int]
):
    weight = normal(num_rows, 7)
    model = product(weight)
    assert quantize_weights(model, precision) == 1
    assert float_weights(model) == []
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul"]
    values, scales = (value for value in model.graph.node(0).inputs)
    assert values is not None
    assert scales is not None
    assert values.dtype == {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}[precision]
    assert list(scales.shape or ()) == scales_shape
    assert {name: attribute.value for name, attribute in model.graph.node(0).attributes.items()} == attributes
    assert float_tensors(model) == [f"w.{precision}.scales"]

    # int4 may clip: a largest weight of nine steps becomes seven.
    tolerance = {"int8": 0.52 / 127, "int4": 2.1 / 9}[precision] * np.abs(weight).max()
    np.testing.assert_allclose(dequantized_weight(model), weight, rtol=0, atol=tolerance)
    error = np.linalg.norm(dequantized_weight(model) - weight) / np.linalg.norm(weight)
    assert error < {"int8": 0.01, "int4": 0.12}[precision]


@both_precisions
def test_tied_head_gets_an_int8_copy_and_the_embedding_stays(precision: Precision):
    embedding = normal(20, 64)
    model = tied_head(embedding)
    assert quantize_weights(model, precision) == 1
    assert float_weights(model) == []
    assert sorted(node.op_type for node in model.graph) == ["DequantizeLinear", "Gather", "MatMul"]
    assert float_tensors(model) == ["embedding", "embedding.int8.scales"]
    logits, hidden = evaluate(model, ids=np.arange(20))
    np.testing.assert_array_equal(hidden, embedding)
    error = np.abs(logits - embedding @ embedding.T).mean() / np.abs(embedding @ embedding.T).mean()
    assert error < 0.02


def test_lm_head_is_int8_and_the_rest_int4_where_logits_are_scaled_too():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["unscaled"]),
        helper.make_node("Mul", ["unscaled", "scale"], ["logits"]),
    ]
    weights = {"w": normal(64, 64), "head": normal(64, 9), "scale": np.ones(1, np.float32)}
    model = make_graph(weights, nodes, 64, ["logits"])
    assert quantize_weights(model, "int4") == 2
    integers = {name: value.dtype for name, value in model.graph.initializers.items() if value.dtype.name != "FLOAT"}
    assert integers == {"w.int4": ir.DataType.INT4, "head.int8": ir.DataType.INT8}


@both_precisions
def test_weight_that_two_products_share_is_quantised_once(precision: Precision):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "w"], ["z"])]
    model = make_graph({"w": normal(32, 32)}, nodes, 32, ["z"])
    assert quantize_weights(model, precision) == 1
    assert sorted(node.op_type for node in model.graph) == ["DequantizeLinear", "MatMul", "MatMul"]
    evaluate(model, x=normal(2, 32))


@pytest.mark.parametrize(
    ("precision", "shape"),
    [("int4", (44, 8)), ("int4", (12, 8)), ("int4", (1, 32)), ("int4", (16, 1)), ("int4", (64, 1))],
)
def test_weight_of_a_shape_that_does_not_allow_it_stays_and_is_named(precision: Precision, shape: tuple[int, int]):
    weight = normal(*shape)
    model = product(weight)
    assert quantize_weights(model, precision) == 0
    assert float_weights(model) == ["w"]
    np.testing.assert_array_equal(dequantized_weight(model), weight)


def test_products_of_two_activations_and_other_weights_are_left_alone():
    nodes = [
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "xt"], ["squares"]),
        helper.make_node("Add", ["x", "bias"], ["y"]),
    ]
    model = make_graph({"bias": normal(32)}, nodes, 32, ["squares", "y"])
    assert quantize_weights(model, "int8") == 0
    assert float_weights(model) == []
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "Add"]


@pytest.mark.parametrize(
    ("dtype_name", "dtype"), [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)], ids=["fp16", "bf16"]
)
@both_precisions
def test_lowering_leaves_the_integers_alone_and_retypes_the_scales(
    precision: Precision, dtype_name: str, dtype: ir.DataType
):
    model = product(normal(64, 8))
    quantize_weights(model, precision)
    before = model.graph.initializers[f"w.{precision}"].const_value
    assert before is not None
    integers = before.numpy().astype(np.int8)
    lower_precision(model, dtype_name, is_fuser=False)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (node,) = (node for node in model.graph if node.op_type == "DequantizeLinear")
    values, scales = node.inputs
    assert values is not None
    assert scales is not None
    assert values.const_value is not None
    np.testing.assert_array_equal(values.const_value.numpy().astype(np.int8), integers)
    assert scales.dtype == node.outputs[0].dtype == dtype
    assert (scales.const_value.numpy() > 0).all()
    assert not any(node.op_type == "Cast" and "dequantized" in str(node.inputs[0]) for node in model.graph)


@pytest.mark.xdist_group("qwen3_from_qwen2")
@pytest.mark.parametrize("name", GRAPHS)
@both_precisions
def test_tensorrt_rtx_builds_a_recorded_pair_with_integer_weights(
    precision: Precision, name: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    model = ir.load(recorded_bundle("qwen3_from_qwen2") / "graphs" / f"{name}.onnx")
    num_products = sum(node.op_type == "MatMul" for node in model.graph)
    num_quantised = quantize_weights(model, precision)
    # The first matrix of each of the fuser's projectors has 44 rows, no multiple of a block; all others fit.
    kept = [weight for weight in float_weights(model) if ".input." in weight]
    assert float_weights(model) == (kept if precision == "int4" and name == "fuser0" else [])
    assert num_quantised == num_products - len(float_weights(model))
    lower_precision(model, "fp16", is_fuser=name == "fuser0")
    path = tmp_path / f"{name}.onnx"
    ir.save(model, path, external_data=f"{name}.onnx.data")
    onnx.checker.check_model(path, full_check=True)
    num_dequantized, engine_size = build_with_tensorrt_rtx(path)
    assert num_dequantized == num_quantised
    assert engine_size > 0


def build_with_tensorrt_rtx(path: Path) -> tuple[int, int]:
    """How many dequantize layers TensorRT parsed, and the size of the engine that it built."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        if -1 in tensor.shape:
            shape = tuple(1 if size == -1 else size for size in tensor.shape)
            longest = tuple(
                16 if size == -1 and axis == len(shape) - 1 else shape[axis] for axis, size in enumerate(tensor.shape)
            )
            profile.set_shape(tensor.name, shape, shape, longest)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return sum(layer.type == trt.LayerType.DEQUANTIZE for layer in layers), engine.nbytes


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (70_000.0, "does not fit into float16, in which int8 and int4"),
        (np.nan, "expected finite weights"),
        (np.inf, "expected finite weights"),
    ],
)
def test_weights_that_float16_cannot_hold_are_refused(precision: Precision, largest: float, expected: str):
    weight = normal(64, 8)
    weight[3, 5] = largest
    with pytest.raises(C2CError, match=expected):
        quantize_weights(product(weight), precision)


def test_a_scale_whose_largest_multiple_leaves_float16_is_refused():
    # 516, the float16 above 65,500 / 127, times 127 is 65,532, which float16 rounds to infinity.
    weight = normal(64, 8)
    weight[3, 5] = 65_500
    with pytest.raises(C2CError, match=r"a weight of 65532 does not fit into float16"):
        quantize_weights(product(weight), "int8")
