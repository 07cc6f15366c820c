"""Graphs in fp16 and bf16: the types on every edge, and the numbers against the float32 graph on ONNX Runtime."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from recorded_pairs import each_pair

from c2c_export.errors import C2CError
from engines.precision import DTYPES, lower_precision

Array = np.ndarray[Any, Any]
FLOAT = ir.DataType.FLOAT
CAPACITY = 256

both_precisions = pytest.mark.parametrize("precision", ["fp16", "bf16"])


def graphs_of(bundle: Path) -> list[Path]:
    found = sorted((bundle / "graphs").glob("*.onnx"))
    assert found
    return found


@functools.cache
def lowered(path: Path, precision: str) -> ir.Model:
    """Shared by tests, none of which changes it."""
    model = ir.load(path)
    lower_precision(model, precision, is_fuser=path.name.startswith("fuser"))
    return model


def nodes(model: ir.Model, *operators: str) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type in operators)


def inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


# Types


@each_pair
@both_precisions
def test_the_graph_passes_onnxs_own_type_check(
    pair: str, precision: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    for path in graphs_of(recorded_bundle(pair)):
        ir.save(lowered(path, precision), tmp_path / path.name, external_data=f"{path.name}.data")
        onnx.checker.check_model(str(tmp_path / path.name), full_check=True)


@each_pair
@both_precisions
def test_caches_attention_and_products_are_in_the_low_precision(
    pair: str, precision: str, recorded_bundle: Callable[[str], Path]
):
    low = DTYPES[precision]
    for path in graphs_of(recorded_bundle(pair)):
        model = lowered(path, precision)
        caches = [
            v
            for v in (*model.graph.inputs, *model.graph.outputs)
            if v.name and ("key." in v.name or "value." in v.name)
        ]
        assert caches
        assert {value.dtype for value in caches} == {low}
        for node in nodes(model, "Attention", "TensorScatter", "RotaryEmbedding"):
            floats = {value.dtype for value in inputs(node)} - {ir.DataType.INT64, ir.DataType.BOOL}
            assert floats == {low}
        assert {value.dtype for node in nodes(model, "MatMul") for value in inputs(node)} <= {low}


@each_pair
@both_precisions
def test_angles_the_fusers_sums_and_weights_and_the_logits_are_float32(
    pair: str, precision: str, recorded_bundle: Callable[[str], Path]
):
    for path in graphs_of(recorded_bundle(pair)):
        model = lowered(path, precision)
        trigonometry = list(nodes(model, "Cos", "Sin"))
        assert bool(trigonometry) == (not path.name.startswith("fuser"))
        # Up to the positions: whatever an angle is computed from.
        pending = trigonometry[:]
        while pending:
            node = pending.pop()
            for value in inputs(node):
                assert value.dtype not in DTYPES.values()
                if value.producer() is not None and value.dtype == FLOAT:
                    pending.append(value.producer())  # type: ignore[arg-type]
        if path.name.startswith("fuser"):
            assert list(nodes(model, "Sigmoid"))
            for node in nodes(model, "Sigmoid", "Mul", "Add", "RMSNormalization"):
                assert {value.dtype for value in (*inputs(node), *node.outputs)} == {FLOAT}, node.name
        logits = [value for value in model.graph.outputs if value.name == "logits"]
        assert [value.dtype for value in logits] == [FLOAT] * path.name.startswith("receiver")


@each_pair
def test_the_statistics_of_every_norm_are_float32(pair: str, recorded_bundle: Callable[[str], Path]):
    for path in graphs_of(recorded_bundle(pair)):
        for node in nodes(lowered(path, "fp16"), "RMSNormalization"):
            assert node.attributes.get_int("stash_type", 1) == TensorProto.FLOAT


@both_precisions
def test_no_float32_weight_is_left_but_those_of_angles(precision: str, recorded_bundle: Callable[[str], Path]):
    for path in graphs_of(recorded_bundle("qwen3_from_qwen2")):
        model = lowered(path, precision)
        # The residual stream's norms read their weights in float32, a fuser's sums their biases.
        vectors = {value for node in nodes(model, "RMSNormalization", "Add") for value in inputs(node)}
        for weight in model.graph.initializers.values():
            assert weight.uses()
            if weight.dtype == FLOAT and weight not in vectors:
                assert weight.const_value is not None
                assert weight.const_value.size <= 64, weight.name


# Numbers


def run(path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def feeds_of(model: ir.Model, num_tokens: int) -> dict[str, Array]:
    """A prompt of `num_tokens` with a gap in its positions, written at row 3 of caches that hold something."""
    random = np.random.default_rng(0)
    values: dict[str, Array] = {
        "input_ids": random.integers(0, 300, (1, num_tokens)),
        "position_ids": (np.arange(num_tokens) * 2 + 3)[None],
        "write_index": np.array([3]),
        "kv_length": np.array([3 + num_tokens]),
        "last_token": np.array([num_tokens - 1]),
        "row_position_ids": (np.arange(CAPACITY) * 2)[None],
        "sharer_rows": np.arange(num_tokens) * 2,
        "receiver_rows": np.arange(num_tokens) + 3,
    }
    for value in model.graph.inputs:
        assert value.name is not None
        if value.name not in values:
            assert value.shape is not None
            shape = [
                size if isinstance(size, int) else (num_tokens if size == "fused_tokens" else 1) for size in value.shape
            ]
            values[value.name] = random.normal(size=shape).astype(np.float32)
    return {value.name: values[value.name] for value in model.graph.inputs if value.name}


@each_pair
def test_fp16_on_onnx_runtime_is_near_float32(pair: str, recorded_bundle: Callable[[str], Path], tmp_path: Path):
    for path in graphs_of(recorded_bundle(pair)):
        feeds = feeds_of(ir.load(path), 9)
        expected = run(path, feeds)
        ir.save(lowered(path, "fp16"), tmp_path / path.name, external_data=f"{path.name}.data")
        low = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in feeds.items()}
        found = run(tmp_path / path.name, low)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # float16 has 11 bits; some dozen roundings follow each other.
            np.testing.assert_allclose(
                found[name].astype(np.float32), value, atol=0.03 * np.abs(value).max(), err_msg=name
            )


def affine(weight: Array) -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10))


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_weights_are_rounded_to_the_nearest(precision: str, dtype: Any):
    weight = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    model = affine(weight)
    assert lower_precision(model, precision, is_fuser=False) == 0
    (lowered_weight,) = model.graph.initializers.values()
    assert lowered_weight.const_value is not None
    np.testing.assert_array_equal(lowered_weight.const_value.numpy(), weight.astype(dtype))


def test_a_weight_beyond_float16_is_refused_by_name_and_kept_in_bf16(tmp_path: Path):
    weight = np.full((4, 4), 70_000, np.float32)
    model = affine(weight)
    with pytest.raises(C2CError, match=r"a weight of 70000 does not fit into float16, in which int8"):
        lower_precision(model, "fp16", is_fuser=False)
    model = affine(weight)
    lower_precision(model, "bf16", is_fuser=False)
    ir.save(model, tmp_path / "graph.onnx", external_data="graph.data")


def test_a_constant_node_becomes_a_weight_of_the_low_precision(tmp_path: Path):
    constant = helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.array([0.5], np.float32)))
    graph = helper.make_graph(
        [constant, helper.make_node("Mul", ["x", "half"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B"])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10))
    lower_precision(model, "fp16", is_fuser=False)
    ir.save(model, tmp_path / "graph.onnx")
    x = np.array([3.0, 5.0], np.float16)
    np.testing.assert_array_equal(run(tmp_path / "graph.onnx", {"x": x})["y"], np.array([1.5, 2.5], np.float16))
