"""Every supported architecture, in every lowering: all parameters and constants are found, and are the trained ones.

Further: what is found of a graph makes the torch model compute as the graph does; and the faults that the recorded
pairs have no place for, since they have no windows, caps, biases or scaled rotations.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from planted_faults import replace
from tiny_models import CAPACITY, CONFIGS, TracedModel, decoder_inputs, run_graph, traced_model
from transformers import PreTrainedModel

from c2c_export.check.graph.decoder_constants import check_decoder_constants
from c2c_export.check.graph.decoder_wiring import check_decoder_wiring
from c2c_export.check.graph.masks import check_masks
from c2c_export.check.graph.needed import decoder_parameters, receiver_caches
from c2c_export.check.graph.parameters import check_parameters
from c2c_export.check.graph.weights import read_graph_weights
from c2c_export.check.trained.decoder import TrainedDecoder
from c2c_export.check_record import Divergence
from engines.lowering import lower
from engines.model_layers import model_layer

LOWERINGS = (
    ("ort-cpu", "fp32"),
    ("ort-cpu", "int8"),
    ("ort-cpu", "int4"),
    ("tensorrt-rtx", "fp16"),
    ("tensorrt-rtx", "bf16"),
    ("tensorrt-rtx", "int8"),
    ("tensorrt-rtx", "int4"),
)


def lowered(traced: TracedModel, folder: Path, target: str, precision: str) -> ir.Model:
    path = folder / "decoder.onnx"
    ir.save(ir.from_proto(traced.passed), path)
    return lower(path, target, precision, is_fuser=False).model


def found_in(graph: ir.Model, model: PreTrainedModel, precision: str) -> list[Divergence]:
    """All that the level `weights` finds in a receiver's graph."""
    return list(_findings(graph, model, precision))


def _findings(graph: ir.Model, model: PreTrainedModel, precision: str) -> Iterator[Divergence]:
    caches, weights = receiver_caches(model), read_graph_weights(graph, model)
    yield from check_parameters("receiver", weights, decoder_parameters(model, caches, has_logits=True), precision)
    yield from check_decoder_constants("receiver", graph, weights, model)
    yield from check_masks("receiver", graph, model)
    yield from check_decoder_wiring("receiver", graph, model, caches, has_logits=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_wrong_in_any_lowering(name: str, tmp_path: Path) -> None:
    traced = traced_model(name)
    assert found_in(ir.from_proto(traced.passed), traced.model, "fp32") == []
    for target, precision in LOWERINGS:
        assert found_in(lowered(traced, tmp_path, target, precision), traced.model, precision) == []


@pytest.mark.parametrize("name", ["llama_untied_biased", "gemma3"])
def test_torch_with_a_graphs_weights_computes_as_the_graph(name: str, tmp_path: Path) -> None:
    traced = traced_model(name)
    graph = lowered(traced, tmp_path, "ort-cpu", "int4")
    for node in graph.graph:
        if node.op_type == "MatMulNBits":  # whose products round their activations otherwise
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    weights = read_graph_weights(graph, traced.model).parameters()
    assert weights.keys() == {key for key, _ in traced.model.named_parameters(remove_duplicate=False)}
    holding = TrainedDecoder(traced.model).holding(weights)
    inputs = decoder_inputs(traced.passed)
    inputs["last_token"] = np.full(2, 5)
    # The operator refuses several tokens of several requests behind earlier rows; there are none.
    inputs |= {key: np.zeros_like(value) for key, value in inputs.items() if key.startswith("past_")}
    graph_outputs, expected = run_graph(ir.to_proto(graph), inputs), holding.run(inputs)
    for key in ("logits", "key.1", "value.1"):
        np.testing.assert_allclose(graph_outputs[key], expected[key], rtol=1e-3, atol=1e-4)


def _constant(value: int) -> Callable[[ir.Graph], None]:
    """Another window: the constant that differences of positions are compared with."""

    def change(graph: ir.Graph) -> None:
        for node in list(graph):
            producer = node.inputs[0].producer() if node.op_type == "Less" else None
            if producer is not None and producer.op_type == "Sub":
                replace(graph, node, 1, np.array(value))

    return change


def _number_rows_from_one(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type == "LessOrEqual":
            rows = node.inputs[0].const_value.numpy()
            assert rows.size == CAPACITY
            replace(graph, node, 0, rows + 1)


def _scale(op_types: tuple[str, ...], module: str, factor: float) -> Callable[[ir.Graph], None]:
    """Multiply the constants of some of a module's nodes."""

    def change(graph: ir.Graph) -> None:
        for node in list(graph):
            if node.op_type in op_types and module in model_layer(node):
                for index, value in enumerate(node.inputs):
                    if value.is_initializer():
                        replace(graph, node, index, (value.const_value.numpy() * factor).astype(np.float32))

    return change


def _attribute(op_type: str, name: str, value: float) -> Callable[[ir.Graph], None]:
    def change(graph: ir.Graph) -> None:
        for node in graph:
            if node.op_type == op_type:
                node.attributes[name] = ir.AttrFloat32(name, value)

    return change


def _exact_gelu(graph: ir.Graph) -> None:
    for node in graph:
        if node.op_type == "Gelu":
            node.attributes["approximate"] = ir.AttrString("approximate", "none")


def _drop_window(graph: ir.Graph) -> None:
    """Every layer attends to everything."""
    both = next(n for n in graph if n.op_type == "And" and any(v.producer().op_type == "And" for v in n.inputs))
    full = next(value for value in both.inputs if value.producer().op_type == "And")
    ir.convenience.replace_all_uses_with(both.outputs[0], full)


@pytest.mark.parametrize(
    ("name", "change", "layer", "message"),
    [
        ("gemma3", _constant(6), 0, "the mask of layer 0: its window is [6], expected 5"),
        ("mistral_sliding", _drop_window, 0, "the mask of layer 0: it has no window, expected one of 5 positions"),
        ("qwen2_sliding_from_layer_1", _constant(4), 1, "the mask of layer 1: its window is [4], expected 5"),
        ("llama_llama3_rope", _number_rows_from_one, 0, "the mask of layer 0: row 0 is numbered 1, expected 0"),
        ("gemma3", _scale(("Mul",), "embed_tokens", 2.0), None, "the embeddings are scaled by [11.3"),
        ("gemma3", _scale(("Div",), "mask", 2.0), None, "the logits' cap is 6, expected 3"),
        ("gemma3", _exact_gelu, 0, "model.layers.0.mlp.act_fn: Gelu do not compute the model's activation function"),
        ("gemma3", _attribute("Attention", "scale", 0.3), 0, "its scores are scaled by 0.3, expected 0.223607"),
        ("llama_yarn_relu", _scale(("Mul",), "layers.0", 1.5), 0, "its cosines and sines are scaled by 1.7"),
        ("llama_llama3_rope", _scale(("Mul",), "rotary", 1.5), 0, "4 of 4 rotary frequencies are not the model's"),
        ("llama_untied_biased", _scale(("Add",), "k_proj", 2.0), 0, "model.layers.0.self_attn.k_proj.bias: "),
        ("llama_untied_biased", _scale(("MatMul",), "lm_head", 2.0), None, "lm_head.weight: "),
    ],
)
def test_a_wrong_constant_is_named(
    name: str, change: Callable[[ir.Graph], None], layer: int | None, message: str
) -> None:
    traced = traced_model(name)
    graph = ir.from_proto(traced.passed)
    change(graph.graph)
    found = found_in(graph, traced.model, "fp32")
    assert any(message in divergence.message and divergence.layer == layer for divergence in found), found
