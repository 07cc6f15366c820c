"""Integer weights for ONNX Runtime's CPU provider, against numpy's own reading of the operators, and float graphs.

`unpacked` reads `MatMulNBits` as the documentation of ONNX Runtime's contrib operators describes it, without the code
under test.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from c2c_export.bundle import read_manifest
from c2c_export.errors import C2CError
from engines.lowering import lower
from engines.ort.blocks import quantize, quantize_with_offsets
from engines.ort.engine import OrtCpuEngine
from engines.ort.quantize import QuantizedForCpu, quantize_for_cpu
from runtime.decoder import Decoder

Precision = Literal["int8", "int4"]
Array = np.ndarray[Any, Any]
# Largest differences, as shares of the largest result: activations in float32, and rounded to 8 bits by block.
EXACT, ROUNDED = 2e-6, 0.02

DECODER_PAIRS = ("qwen3_from_qwen2", "llama_from_gemma3_aligned")

both_precisions = pytest.mark.parametrize("precision", ["int8", "int4"])


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([*shape, seed]).normal(0, 0.05, shape).astype(np.float32)


def q4_1(num_rows: int, num_columns: int) -> Array:
    """Weights as files in Q4_1 have them: integers from 0 to 15 times a scale, plus a minimum, by 32 rows."""
    rng = np.random.default_rng([num_rows, num_columns])
    values = rng.integers(0, 16, (num_rows // 32, 32, num_columns)).astype(np.float32)
    values[:, 0], values[:, 1] = 0, 15
    scales, minima = rng.uniform(0.01, 0.02, (2, num_rows // 32, 1, num_columns)).astype(np.float32)
    return (values * scales - 7 * minima).reshape(num_rows, num_columns)


def q8_0(num_rows: int, num_columns: int, largest: int = 127) -> Array:
    """Weights as files in Q8_0 have them (127), or those of Q4_0 and Q5_0 (8, 16): integers times a scale."""
    rng = np.random.default_rng([num_rows, num_columns, largest])
    values = rng.integers(-largest + 1, largest, (num_rows // 32, 32, num_columns))
    values[:, 0] = np.where(rng.random((num_rows // 32, num_columns)) < 0.5, -largest, largest)
    scales = rng.uniform(0.001, 0.002, (num_rows // 32, 1, num_columns)).astype(np.float16).astype(np.float32)
    return (values * scales).astype(np.float32).reshape(num_rows, num_columns)


def make_graph(
    weights: dict[str, Array], nodes: list[onnx.NodeProto], width: int, outputs: list[str], rank: int = 3
) -> ir.Model:
    """A graph from x [B,S,width] (or [S,width]) and input_ids [B,S] to `outputs`."""
    leading = ["B", "S"][3 - rank :]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [*leading, width]),
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, results, initializers)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(
        onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    )


def product(weight: Array, rank: int = 3) -> ir.Model:
    return make_graph({"w": weight}, [helper.make_node("MatMul", ["x", "w"], ["y"])], weight.shape[0], ["y"], rank)


def run(model: ir.Model, **inputs: Array) -> list[Array]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {value.name: inputs[value.name] for value in session.get_inputs() if value.name in inputs}
    unread = {value.name for value in session.get_inputs()} - set(wanted)
    assert unread <= {"input_ids", "x"}
    wanted |= {"input_ids": np.zeros((1, 1), np.int64)} if "input_ids" in unread else {}
    wanted |= {"x": np.zeros((1, 1, session.get_inputs()[0].shape[-1]), np.float32)} if "x" in unread else {}
    results: list[Array] = session.run(None, wanted)
    return results


def constant(node: ir.Node, index: int) -> Array:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def unpacked(packed: Array, bits: int, count: int) -> Array:
    """The first `count` unsigned integers of the last axis's bytes, low bits first."""
    if bits == 8:
        return packed[..., :count].astype(np.float64)
    halves = np.stack([packed % 16, packed // 16], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1)[..., :count].astype(np.float64)


def multiplied_weight(node: ir.Node) -> Array:
    """The matrix [K,N] of a `MatMulNBits`: (value - zero point) * scale, by columns and blocks of their rows."""
    size, num_rows, num_columns, bits = (node.attributes[name].as_int() for name in ("block_size", "K", "N", "bits"))
    num_blocks = -(-num_rows // size)
    values, scales, zero_points = (constant(node, index) for index in (1, 2, 3))
    assert values.shape == (num_columns, num_blocks, size * bits // 8)
    assert scales.shape == (num_columns, num_blocks)
    assert zero_points.shape == (num_columns, -(-num_blocks * bits // 8))
    steps = unpacked(values, bits, size) - unpacked(zero_points, bits, num_blocks)[..., np.newaxis]
    return (steps * scales[..., np.newaxis]).reshape(num_columns, -1)[:, :num_rows].T


def whole_weight(node: ir.Node) -> Array:
    """What activations are multiplied by, offsets included: their rows are spread over the blocks they are of."""
    weight = multiplied_weight(node)
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is None or producer.op_type != "Concat":
        return weight
    num_rows = len(weight) * 32 // 33
    return weight[:num_rows] + np.repeat(weight[num_rows:], 32, axis=0)


def products_of(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "MatMulNBits"]


def assert_close(found: Array, expected: Array, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def relative_error(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["int8", "int4"]), st.integers(32, 200), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_product_of_any_shape_is_that_with_the_unpacked_weight(
    precision: Precision, num_rows: int, num_columns: int, num_tokens: int, offsets: bool
):
    weight = q4_1(num_rows // 32 * 32, num_columns) if offsets else normal(num_rows, num_columns)
    model = product(weight)
    counts = quantize_for_cpu(model, precision)
    has_offsets = offsets and precision == "int4"
    assert counts == QuantizedForCpu(1, int(has_offsets), 0, 0)
    (node,) = products_of(model)
    used = whole_weight(node)
    assert relative_error(used, weight) < (0.012 if has_offsets else {"int8": 0.006, "int4": 0.1}[precision])
    x = normal(2, num_tokens, len(weight))
    assert_close(run(model, x=x)[0], x.astype(np.float64) @ used, EXACT)


@both_precisions
@pytest.mark.parametrize("weight", [normal(96, 40), q4_1(96, 40)], ids=["normal", "q4_1"])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_product_for_logits_rounds_activations_and_stays_near(precision: Precision, weight: Array, num_tokens: int):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "head"], ["logits"])]
    model = make_graph({"w": weight, "head": normal(40, 50)}, nodes, 96, ["y", "logits"])
    quantize_for_cpu(model, precision)
    body, head = products_of(model)
    assert [node.attributes["accuracy_level"].as_int() for node in (body, head)] == [4, 4]
    x = normal(1, num_tokens, 96)
    hidden, logits = run(model, x=x)
    expected = x @ whole_weight(body)
    assert_close(hidden, expected, ROUNDED)
    assert_close(logits, hidden @ multiplied_weight(head), ROUNDED)


@both_precisions
def test_graph_gives_what_a_float_graph_with_the_dequantised_weights_gives(precision: Precision):
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["hidden"]),
        helper.make_node("Sigmoid", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "down"], ["y"]),
    ]
    weights = {"up": q4_1(64, 80), "down": normal(80, 64)}
    model = make_graph(weights, nodes, 64, ["y"])
    quantize_for_cpu(model, precision)
    up, down = (whole_weight(node).astype(np.float32) for node in products_of(model))
    x = normal(1, 5, 64)
    expected = run(make_graph({"up": up, "down": down}, nodes, 64, ["y"]), x=x)[0]
    assert_close(run(model, x=x)[0], expected, EXACT)


@pytest.mark.parametrize("largest", [8, 16, 127])
def test_weights_of_symmetric_files_come_back_exactly_in_8_bits(largest: int):
    weight = q8_0(96, 30, largest)
    np.testing.assert_allclose(quantize(weight, 8).dequantized(), weight, rtol=1e-6, atol=0)


def test_weights_of_symmetric_4_bit_files_come_back_exactly_in_4_bits():
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (3, 32, 30)).astype(np.float32)
    values[:, 0] = -8
    # The sign of a scale is that of the block's largest weight, turned round.
    scales = rng.uniform(0.01, 0.02, (3, 1, 30)) * rng.choice([-1, 1], (3, 1, 30))
    weight = (values * scales).astype(np.float32).reshape(96, 30)
    np.testing.assert_allclose(quantize(weight, 4).dequantized(), weight, rtol=1e-6, atol=0)


def test_weights_with_minima_come_back_exactly_but_for_the_rounding_of_offsets():
    weight = q4_1(128, 30)
    blocks, offsets = quantize_with_offsets(weight)
    assert offsets.shape == (4, 30)
    np.testing.assert_allclose(blocks.dequantized() + np.repeat(offsets, 32, axis=0), weight, rtol=0, atol=1e-6)
    assert relative_error(blocks.dequantized(), weight) > 0.03


def test_4_bits_err_less_than_onnxruntimes_own_rounding():
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    weight = normal(256, 40)
    quantizer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False))
    values, scales, zero_points = quantizer.qbits_block_quant(weight)
    steps = unpacked(values, 4, 32) - unpacked(zero_points, 4, 8)[..., np.newaxis]
    rounded = (steps * scales[..., np.newaxis]).reshape(40, 256).T
    found = relative_error(quantize(weight, 4).dequantized(), weight)
    assert found < 0.97 * relative_error(rounded, weight)


@pytest.mark.parametrize("value", [0.0, 1e-38, -3.0, 1e30])
def test_constant_blocks_come_back(value: float):
    weight = np.full((64, 2), value, dtype=np.float32)
    for blocks in (quantize(weight, 8), quantize(weight, 4)):
        assert np.isfinite(blocks.scales).all()
        np.testing.assert_allclose(blocks.dequantized(), weight, rtol=1e-3, atol=1e-30)
    blocks, offsets = quantize_with_offsets(weight)
    np.testing.assert_allclose(blocks.dequantized() + np.repeat(offsets, 32, axis=0), weight, rtol=1e-3, atol=1e-30)


@both_precisions
def test_head_that_is_the_embedding_has_8_bits_and_so_has_the_embedding(precision: Precision):
    embedding = q8_0(96, 50).T.copy()
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]),
        helper.make_node("Transpose", ["embedding"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    model = make_graph({"embedding": embedding}, nodes, 96, ["logits", "hidden"])
    assert quantize_for_cpu(model, precision) == QuantizedForCpu(1, 0, 1, 0)
    assert sorted(node.op_type for node in model.graph) == ["GatherBlockQuantized", "MatMulNBits", "Reshape"]
    assert "embedding" not in model.graph.initializers
    # The integers are stored once, for both.
    lookup = next(node for node in model.graph if node.op_type == "GatherBlockQuantized")
    assert lookup.inputs[0] is products_of(model)[0].inputs[1]
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    assert stored < 1.5 * embedding.size
    np.testing.assert_allclose(multiplied_weight(products_of(model)[0]), embedding.T, rtol=1e-6, atol=0)
    ids = np.arange(50).reshape(5, 10)
    logits, hidden = run(model, input_ids=ids)
    np.testing.assert_allclose(hidden, embedding[ids], rtol=1e-6, atol=0)
    assert_close(logits, embedding[ids] @ embedding.T, ROUNDED)


@both_precisions
def test_head_that_is_an_embedding_of_no_whole_blocks_has_a_table_of_its_own(precision: Precision):
    embedding = normal(50, 75)
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]),
        helper.make_node("Transpose", ["embedding"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    model = make_graph({"embedding": embedding}, nodes, 75, ["logits", "hidden"])
    assert quantize_for_cpu(model, precision) == QuantizedForCpu(1, 0, 1, 0)
    ids = np.array([[0, 19, 3]])
    logits, hidden = run(model, input_ids=ids)
    np.testing.assert_allclose(hidden, embedding[ids], rtol=0, atol=np.abs(embedding).max() / 250)
    assert_close(logits, hidden @ multiplied_weight(products_of(model)[0]), ROUNDED)


def test_embedding_whose_rows_are_no_whole_blocks():
    table = normal(20, 75)
    model = make_graph({"table": table}, [helper.make_node("Gather", ["table", "input_ids"], ["y"])], 1, ["y"])
    assert quantize_for_cpu(model, "int4") == QuantizedForCpu(0, 0, 1, 0)
    ids = np.array([[0, 19, 3]])
    found = run(model, input_ids=ids)[0]
    assert found.shape == (1, 3, 75)
    np.testing.assert_allclose(found, table[ids], rtol=0, atol=np.abs(table).max() / 250)


def test_a_table_that_something_else_is_looked_up_in_stays():
    table = normal(20, 64)
    nodes = [
        helper.make_node("Abs", ["input_ids"], ["rows"]),
        helper.make_node("Gather", ["table", "rows"], ["y"]),
    ]
    model = make_graph({"table": table}, nodes, 1, ["y"])
    assert quantize_for_cpu(model, "int8") == QuantizedForCpu(0, 0, 0, 0)
    ids = np.array([[0, 19]])
    np.testing.assert_array_equal(run(model, input_ids=ids)[0], table[ids])


@pytest.mark.parametrize("precision", ["fp16", "INT8", "int2", ""])
def test_another_precision_is_refused(precision: str):
    with pytest.raises(C2CError, match=f"precision '{precision}': expected one of int8, int4"):
        quantize_for_cpu(product(normal(64, 8)), precision)


@both_precisions
def test_shared_weight_and_sums_are_made_once(precision: Precision):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("MatMul", ["x", "v"], ["u"]),
        helper.make_node("MatMul", ["y", "w"], ["z"]),
    ]
    model = make_graph({"w": q4_1(64, 64), "v": q4_1(64, 64)[:, ::-1].copy()}, nodes, 64, ["z", "u"])
    assert quantize_for_cpu(model, precision) == QuantizedForCpu(2, 2 if precision == "int4" else 0, 0, 0)
    first, second, third = products_of(model)
    assert first.inputs[1:] == third.inputs[1:]
    assert first.inputs[0] is second.inputs[0]
    # One for x, one for y.
    assert sum(node.op_type == "Concat" for node in model.graph) == (2 if precision == "int4" else 0)
    x = normal(1, 3, 64)
    z, u = run(model, x=x)
    w, v = whole_weight(first), whole_weight(second)
    assert_close(z, x @ w @ w, EXACT)
    assert_close(u, x @ v, EXACT)


def test_weights_of_activations_without_a_batch_have_offsets_too():
    weight = q4_1(64, 12)
    model = product(weight, rank=2)
    assert quantize_for_cpu(model, "int4").with_offsets == 1
    x = normal(5, 64)
    assert_close(run(model, x=x)[0], x @ weight, 0.01)


@both_precisions
def test_matrices_of_few_rows_and_what_is_no_weight_stay(precision: Precision):
    nodes = [
        helper.make_node("MatMul", ["x", "small"], ["y"]),
        helper.make_node("Add", ["y", "bias"], ["z"]),
        helper.make_node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["xt", "x"], ["squares"]),
    ]
    model = make_graph({"small": normal(31, 8), "bias": normal(8)}, nodes, 31, ["z", "squares"])
    assert quantize_for_cpu(model, precision) == QuantizedForCpu(0, 0, 0, 1)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Transpose", "MatMul"]


@both_precisions
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_refused_with_its_layer(precision: Precision, value: float):
    weight = normal(64, 8)
    weight[3, 5] = value
    model = product(weight)
    model.graph.node(0).metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model.layers.3.mlp', 'matmul']"
    with pytest.raises(C2CError, match=r"layer layers\.3\.mlp: a weight is (nan|inf), expected finite weights"):
        quantize_for_cpu(model, precision)


@both_precisions
def test_weights_further_apart_than_float32_reaches_are_refused_with_their_layer(precision: Precision):
    weight = normal(64, 8)
    weight[3, 5], weight[4, 5] = 3e38, -3e38
    model = product(weight)
    model.graph.node(0).metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model.layers.3.mlp', 'matmul']"
    with pytest.raises(C2CError, match=r"layer layers\.3\.mlp: its weights go from -3e\+38 to 3e\+38"):
        quantize_for_cpu(model, precision)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [1, 3, 32, 50])
def test_the_error_is_that_of_the_matrix_without_its_padding(num_rows: int, bits: Literal[4, 8]):
    weight = normal(num_rows, 9)
    blocks = quantize(weight, bits)
    difference = blocks.dequantized()[:num_rows].astype(np.float64) - weight
    assert blocks.error == pytest.approx(np.square(difference).sum(), rel=1e-3, abs=1e-9)


def test_product_of_unknown_rank_is_refused_by_name():
    model = product(q4_1(64, 8))
    node = model.graph.node(0)
    node.name = "node_3"
    for value in (*node.inputs[:1], *node.outputs):
        assert value is not None
        value.shape = None
    with pytest.raises(C2CError, match=r"node node_3 .* its shape is unknown"):
        quantize_for_cpu(model, "int4")


@pytest.mark.xdist_group("qwen3_from_qwen2")
@pytest.mark.parametrize("name", ["receiver", "sharer0", "fuser0"])
@both_precisions
def test_onnxruntime_loads_a_recorded_pair_without_float_matrices(
    precision: Precision, name: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    model = ir.load(recorded_bundle("qwen3_from_qwen2") / "graphs" / f"{name}.onnx")
    num_products = sum(node.op_type == "MatMul" for node in model.graph)
    counts = quantize_for_cpu(model, precision)
    left = [node for node in model.graph if node.op_type == "MatMul"]
    assert len(products_of(model)) + len(left) == num_products
    assert (counts.kept_in_float == 0) == (not left)
    path = tmp_path / f"{name}.onnx"
    ir.save(model, path, external_data=f"{name}.onnx.data")
    ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def table_of(lookup: ir.Node) -> Array:
    """The table [V,D] of a `GatherBlockQuantized`, padding included."""
    values, scales, zero_points = (constant(lookup, index) for index in (0, 2, 3))
    blocks = np.pad(values.reshape(len(values), -1), ((0, 0), (0, -values[0].size % 32))).reshape(len(values), -1, 32)
    steps = blocks.astype(np.float64) - zero_points.reshape(*blocks.shape[:2], 1)
    return (steps * scales.reshape(*blocks.shape[:2], 1)).reshape(len(values), -1)


def with_dequantised_weights(lowered: ir.Model, quantised: ir.Model) -> ir.Model:
    """`lowered`, in float, with the weights that `quantised`, made of the same graph, has in integers."""
    weights = {node.outputs[0].name: whole_weight(node) for node in products_of(quantised)}
    for node in quantised.graph:
        if node.op_type == "GatherBlockQuantized":
            given = node.outputs[0]
            reshaped = next((use.node for use in given.uses() if use.node.op_type == "Reshape"), None)
            weights[given.name if reshaped is None else reshaped.outputs[0].name] = table_of(node)
    replaced = set()
    for node in lowered.graph:
        name = node.outputs[0].name
        if node.op_type in ("MatMul", "Gather") and name in weights:
            index = 1 if node.op_type == "MatMul" else 0
            old = node.inputs[index]
            assert old is not None
            width = node.outputs[0].shape[-1] if node.outputs[0].shape is not None else None
            weight = weights[name][:, : int(width)] if isinstance(width, int) else weights[name]
            value = ir.Value(name=f"{name}.weight", const_value=ir.tensor(weight.astype(np.float32), name=f"{name}.w"))
            lowered.graph.register_initializer(value)
            node.replace_input_with(index, value)
            replaced.add(name)
    assert replaced == set(weights)
    return lowered


def decoded(model: ir.Model, path: Path, vocab_size: int) -> Iterator[tuple[str, Array]]:
    """Logits of three prompts of different lengths and of steps that serve their slots together, and all caches."""
    ir.save(model, path, external_data=f"{path.name}.data")
    lengths, num_steps, capacity = np.array([3, 19, 8]), 5, 256
    decoder = Decoder(OrtCpuEngine(path, 1), len(lengths), capacity)
    random = np.random.default_rng(0)
    for slot, length in enumerate(lengths):
        decoder.run(slot, random.integers(0, vocab_size, length), np.arange(length), 0)
        yield f"prompt {slot}", decoder.logits()
    for step in range(num_steps):
        rows = lengths + step
        decoder.run_step(random.integers(0, vocab_size, len(lengths)), rows + 2, rows)
        yield f"step {step}", decoder.step_logits(len(lengths))
    for name in (spec.name for spec in decoder._engine.outputs if spec.name != "logits"):
        for slot, length in enumerate(lengths):
            yield f"{name} of slot {slot}", decoder.pool.read_rows(name, slot, 0, int(length) + num_steps)


@pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in DECODER_PAIRS], ids=DECODER_PAIRS
)
# Eight bits a layer add up, in models that are random more than in trained ones.
@pytest.mark.parametrize(("level", "tolerance"), [(1, 1e-5), (4, 0.12)], ids=["float activations", "8-bit activations"])
@both_precisions
def test_a_quantised_decoder_computes_what_its_integers_stand_for(
    precision: Precision,
    level: int,
    tolerance: float,
    pair: str,
    recorded_bundle: Callable[[str], Path],
    tmp_path: Path,
):
    bundle = recorded_bundle(pair)
    portable, vocab_size = bundle / "graphs" / "receiver.onnx", read_manifest(bundle).receiver.vocab_size
    quantised, plain = (lower(portable, "ort-cpu", name, is_fuser=False).model for name in (precision, "fp32"))
    expected = decoded(with_dequantised_weights(plain, quantised), tmp_path / "float.onnx", vocab_size)
    for node in products_of(quantised):
        assert node.attributes["accuracy_level"].as_int() == 4
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    found = decoded(quantised, tmp_path / "integers.onnx", vocab_size)
    for (name, wanted), (_, result) in zip(expected, found, strict=True):
        error = relative_error(result, wanted)
        assert error <= tolerance, f"{name}: {error:.3g}"
