"""The last layer's MLP is computed of the chosen tokens alone, and the logits stay what they were."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from c2c_export.passes.select_last_token import select_last_token

WIDTH, HIDDEN, VOCAB = 6, 10, 8


def last_layers(**replaced: onnx.NodeProto) -> ir.Model:
    """keys = x k; h = x + x o; logits = norm(h + w2 gelu(w1 norm(h)))[last_token] head.

    `replaced` are nodes in the place of those that give these values. `tokens` [S,W], `shared` [1,S,W] and `mixing`
    [B,S,S] are inputs that have a row for every token, `row` [1,W] a constant that has one.
    """
    nodes = [
        helper.make_node("MatMul", ["x", "k"], ["keys"]),
        helper.make_node("MatMul", ["x", "o"], ["attended"]),
        helper.make_node("Add", ["x", "attended"], ["h"]),
        helper.make_node("RMSNormalization", ["h", "scale"], ["normed"], axis=-1, epsilon=1e-6),
        helper.make_node("MatMul", ["normed", "w1"], ["wide"]),
        helper.make_node("Gelu", ["wide"], ["bent"]),
        helper.make_node("MatMul", ["bent", "w2"], ["narrow"]),
        helper.make_node("Add", ["h", "narrow"], ["sum"]),
        helper.make_node("RMSNormalization", ["sum", "scale"], ["final"], axis=-1, epsilon=1e-6),
        helper.make_node("Unsqueeze", ["last_token", "axes"], ["unsqueezed"]),
        helper.make_node("Expand", ["unsqueezed", "shape"], ["index"]),
        helper.make_node("GatherElements", ["final", "index"], ["chosen"], axis=1),
        helper.make_node("MatMul", ["chosen", "head"], ["logits"]),
    ]
    nodes = [replaced.get(node.output[0], node) for node in nodes]
    random = np.random.default_rng(0)
    shapes = {
        "k": (WIDTH, 4),
        "o": (WIDTH, WIDTH),
        "w1": (WIDTH, HIDDEN),
        "w2": (HIDDEN, WIDTH),
        "head": (WIDTH, VOCAB),
        "scale": (WIDTH,),
        "row": (1, WIDTH),
    }
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    constants = {"axes": np.array([1, 2]), "shape": np.array([1, 1, WIDTH])}
    graph = helper.make_graph(
        nodes,
        "last layers",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", WIDTH]),
            helper.make_tensor_value_info("last_token", TensorProto.INT64, ["B"]),
            helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["S", WIDTH]),
            helper.make_tensor_value_info("shared", TensorProto.FLOAT, [1, "S", WIDTH]),
            helper.make_tensor_value_info("mixing", TensorProto.FLOAT, ["B", "S", "S"]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 1, VOCAB]),
            helper.make_tensor_value_info("keys", TensorProto.FLOAT, ["B", "S", 4]),
        ],
        [numpy_helper.from_array(array, name) for name, array in {**weights, **constants}.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10))
    return ir.passes.common.ShapeInferencePass()(model).model


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_logits_and_keys_stay_what_they_were(batch: int, tokens: int, seed: int):
    random = np.random.default_rng(seed)
    feed = {
        "x": random.normal(size=(batch, tokens, WIDTH)).astype(np.float32),
        "last_token": random.integers(0, tokens, batch),
        "tokens": random.normal(size=(tokens, WIDTH)).astype(np.float32),
        "shared": random.normal(size=(1, tokens, WIDTH)).astype(np.float32),
        "mixing": random.normal(size=(batch, tokens, tokens)).astype(np.float32),
    }
    moved = last_layers()
    select_last_token(moved)
    before, after = (ReferenceEvaluator(ir.to_proto(model)).run(None, feed) for model in (last_layers(), moved))
    for expected, found in zip(before, after, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_only_what_something_else_reads_is_computed_of_all_tokens():
    model = last_layers()
    # From the product with `o` to the final norm: two norms, three products, a GELU and two sums.
    assert select_last_token(model) == 8
    shapes = {node.outputs[0].name: node.outputs[0].shape for node in model.graph}
    of_all = [name for name, shape in shapes.items() if shape is not None and shape[1] == "S"]
    assert of_all == ["keys"]
    chosen = Counter(node.inputs[0].name for node in model.graph if node.op_type == "GatherElements" and node.inputs[0])
    assert chosen == {"x": 1}


def test_what_another_output_reads_stays_computed_of_all_tokens():
    model = last_layers()
    normed = next(node.outputs[0] for node in model.graph if node.outputs[0].name == "normed")
    model.graph.outputs.append(normed)
    # The final norm, its sum, and the MLP; not the norm that is read, nor what lies above it.
    assert select_last_token(model) == 5


MIXING = {
    "a norm over the tokens too": helper.make_node("RMSNormalization", ["sum", "scale"], ["final"], axis=1),
    "a norm whose weight has tokens": helper.make_node("RMSNormalization", ["sum", "tokens"], ["final"], axis=-1),
    "a summand by token": helper.make_node("Add", ["sum", "tokens"], ["final"]),
    "a summand of every request": helper.make_node("Add", ["shared", "sum"], ["final"]),
    "a product with tokens": helper.make_node("MatMul", ["mixing", "sum"], ["final"]),
}


@pytest.mark.parametrize("case", MIXING)
def test_what_may_mix_tokens_stays_computed_of_all(case: str):
    model = last_layers(final=MIXING[case])
    before = [str(node) for node in model.graph]
    assert select_last_token(model) == 0
    assert [str(node) for node in model.graph] == before


@pytest.mark.parametrize(
    "final",
    [
        helper.make_node("Add", ["sum", "row"], ["final"]),
        helper.make_node("Mul", ["scale", "sum"], ["final"]),
        helper.make_node("RMSNormalization", ["sum", "scale"], ["final"], axis=2),
    ],
    ids=["a row", "a scale", "a positive axis"],
)
def test_what_is_the_same_for_all_tokens_moves_with_them(final: onnx.NodeProto):
    assert select_last_token(last_layers(final=final)) == 8


def test_a_graph_without_logits_is_left_alone():
    model = last_layers()
    model.graph.outputs.pop(0)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert select_last_token(model) == 0
