"""Lowered graphs keep the residual stream in float32: sums beyond float16's range, as Gemma's, stay finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.precision import lower_precision

Array = np.ndarray[Any, Any]
WIDTH = 8

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def two_layers() -> ir.Model:
    """y = norm(h + h a) b with h = x + x c, where c makes h some 100,000."""
    nodes = [
        helper.make_node("MatMul", ["x", "c"], ["xc"]),
        helper.make_node("Add", ["x", "xc"], ["h"]),
        helper.make_node("RMSNormalization", ["h", "weight"], ["normed"], axis=-1, epsilon=1e-6, stash_type=1),
        helper.make_node("MatMul", ["normed", "a"], ["ha"]),
        helper.make_node("Add", ["h", "ha"], ["sum"]),
        helper.make_node("RMSNormalization", ["sum", "weight"], ["last"], axis=-1, epsilon=1e-6, stash_type=1),
        helper.make_node("MatMul", ["last", "b"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in "ab"}
    weights |= {"c": np.eye(WIDTH, dtype=np.float32), "weight": np.ones(WIDTH, np.float32)}
    weights["bias"] = random.normal(size=WIDTH).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "two layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10))


def run(model: ir.Model, x: Array) -> Array:
    # onnx's reference adds in the dtype of the graph; ONNX Runtime's CPU kernels would add float16 in float32.
    result: Array = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]
    return result


def test_sums_beyond_float16_stay_finite_and_right():
    x = np.random.default_rng(1).uniform(-60_000, 60_000, (4, WIDTH)).astype(np.float16)
    assert np.abs(2 * x.astype(np.float32)).max() > np.finfo(np.float16).max
    expected = run(two_layers(), x.astype(np.float32))
    model = two_layers()
    lower_precision(model, "fp16", is_fuser=False)
    found = run(model, x)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sums_and_their_norms_are_float32_and_products_and_biases_are_not(precision: str):
    model = two_layers()
    lower_precision(model, precision, is_fuser=False)
    low = {"fp16": FLOAT16, "bf16": BFLOAT16}[precision]
    found = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert {found[name] for name in ("h", "sum", "normed", "last")} == {FLOAT}
    assert {found[name] for name in ("xc", "ha", "product", "y")} == {low}
    # The norm's result is rounded once, whoever reads it.
    assert sum(node.op_type == "Cast" and node.inputs[0].name == "last" for node in model.graph) == 1


@pytest.mark.xdist_group("llama_from_gemma3_aligned")
def test_every_sum_of_a_gemma_sharer_is_float32_and_every_product_float16(recorded_bundle: Callable[[str], Path]):
    model = ir.load(recorded_bundle("llama_from_gemma3_aligned") / "graphs" / "sharer0.onnx")
    lower_precision(model, "fp16", is_fuser=False)
    dtypes = {
        op_type: {node.outputs[0].dtype for node in model.graph if node.op_type == op_type} - {ir.DataType.INT64}
        for op_type in ("Add", "MatMul", "Attention", "RotaryEmbedding", "TensorScatter", "Gelu")
    }
    assert dtypes.pop("Add") == {FLOAT}
    assert set(map(frozenset, dtypes.values())) == {frozenset({FLOAT16})}


@pytest.mark.xdist_group("llama_from_gemma3_aligned")
def test_gemmas_scale_of_the_embedding_is_not_rounded(recorded_bundle: Callable[[str], Path]):
    model = ir.load(recorded_bundle("llama_from_gemma3_aligned") / "graphs" / "sharer0.onnx")
    lower_precision(model, "bf16", is_fuser=False)
    (embedding,) = (node for node in model.graph if node.op_type == "Gather" and node.inputs[1] in model.graph.inputs)
    (cast,) = (use.node for use in embedding.outputs[0].uses())
    (scale,) = (use.node for use in cast.outputs[0].uses())
    assert (cast.op_type, scale.op_type) == ("Cast", "Mul")
    assert {value.dtype for value in (*scale.inputs, *scale.outputs)} == {FLOAT}


@pytest.mark.xdist_group("llama_from_gemma3_aligned")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_chosen_tokens_row_of_the_residual_stream_stays_float32(
    precision: str, recorded_bundle: Callable[[str], Path]
):
    model = ir.load(recorded_bundle("llama_from_gemma3_aligned") / "graphs" / "receiver.onnx")
    lower_precision(model, precision, is_fuser=False)
    low = {"fp16": FLOAT16, "bf16": BFLOAT16}[precision]
    choices = [node for node in model.graph if node.op_type == "GatherElements"]
    # What attention gave, and the sum that it is added to.
    assert {node.outputs[0].dtype for node in choices} == {FLOAT, low}
    (residual,) = (node for node in choices if node.outputs[0].dtype == FLOAT)
    assert residual.inputs[0].producer().op_type == "Add"
    assert [use.node.op_type for use in residual.outputs[0].uses()] == ["Add"]
