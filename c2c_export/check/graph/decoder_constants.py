"""What a decoder's graph computes with beside its weights: norm epsilons, rotations, scales, caps, activations.

In: the graph, its weights as read, and the trained model. Out: a `Divergence` for each constant that is another, or
that nothing here explains. Not covered: masks, see `masks`.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from c2c_export.check.graph.activations import evaluate
from c2c_export.check.graph.masks import explained_by_masks
from c2c_export.check.graph.modules import decoder_layer, submodule
from c2c_export.check.graph.norms import epsilon_problem
from c2c_export.check.graph.rotary import rotary_problem
from c2c_export.check.graph.weights import GraphWeights, OtherConstant
from c2c_export.check_record import Divergence
from engines.model_layers import NO_LAYER, model_layer

_ATTENTION_SIZES = {"GroupQueryAttention": ("num_heads", "kv_num_heads"), "Attention": ()}
_UNSET = (0, -1)
"""What integer attributes of attentions are where they do nothing."""
_ACTIVATION_ERROR = 1e-5
"""Of a formula of a few float32 operations at points up to 8; GELU and its approximation by tanh differ by 5e-4."""
_POINTS = np.linspace(-8, 8, 129, dtype=np.float32)


def check_decoder_constants(
    name: str, graph: ir.Model, weights: GraphWeights, trained: PreTrainedModel
) -> Iterator[Divergence]:
    """See the module's docstring."""
    for node in graph.graph:
        module = model_layer(node)
        problem = None
        if node.op_type == "RMSNormalization":
            problem = _norm_problem(node, module, trained)
        elif node.op_type in _ATTENTION_SIZES:
            problem = _attention_problem(node, module, trained)
        elif node.op_type == "RotaryEmbedding":
            problem = rotary_problem(node, module, trained)
        if problem:
            yield Divergence(graph=name, layer=decoder_layer(module), message=f"{module}: {problem}")
    yield from _check_activations(name, graph.graph, trained)
    for problem in _softcap_problems(graph.graph, weights, trained):
        yield Divergence(graph=name, message=problem)
    for other in weights.others:
        problem = _other_problem(other, trained)
        if problem:
            yield Divergence(graph=name, layer=decoder_layer(other.module), message=problem)


def _norm_problem(node: ir.Node, module: str, trained: PreTrainedModel) -> str | None:
    norm = submodule(trained, module)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return "the model's norm has no epsilon" if epsilon is None else epsilon_problem(node, float(epsilon))


def _attention_problem(node: ir.Node, module: str, trained: PreTrainedModel) -> str | None:
    attention, config = submodule(trained, module), trained.config
    if attention is None or not hasattr(attention, "scaling"):
        return "the model has no such attention"
    expected = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads}
    for attribute in _ATTENTION_SIZES[node.op_type]:
        found = node.attributes.get_int(attribute, 0)
        if found != expected[attribute]:
            return f"its {attribute} is {found}, expected {expected[attribute]}"
    scale = node.attributes.get_float("scale", 0.0)
    if np.float32(scale) != np.float32(attention.scaling):
        return f"its scores are scaled by {scale:.6g}, expected {attention.scaling:.6g}"
    for attribute in node.attributes.values():
        if attribute.name not in ("scale", *_ATTENTION_SIZES[node.op_type]) and attribute.value not in _UNSET:
            return f"its attribute {attribute.name} is {attribute.value}, expected none"
    return None


def _check_activations(name: str, graph: ir.Graph, trained: PreTrainedModel) -> Iterator[Divergence]:
    nodes_of: dict[str, list[ir.Node]] = {}
    for node in graph:
        module = model_layer(node)
        if module.endswith(".act_fn"):
            nodes_of.setdefault(module, []).append(node)
    points = torch.from_numpy(_POINTS)
    for module, nodes in nodes_of.items():
        found, activation = evaluate(nodes, _POINTS), submodule(trained, module)
        with torch.no_grad():
            expected = _POINTS if activation is None else activation(points).numpy()
        if found is None or not np.all(np.abs(found - expected) <= _ACTIVATION_ERROR):
            operators = ", ".join(node.op_type for node in nodes)
            message = f"{module}: {operators} do not compute the model's activation function"
            yield Divergence(graph=name, layer=decoder_layer(module), message=message)


def _softcap_problems(graph: ir.Graph, weights: GraphWeights, trained: PreTrainedModel) -> Iterator[str]:
    """The logits are `tanh(x / cap) * cap`, or have no cap."""
    if all(output.name != "logits" for output in graph.outputs):
        return
    cap = getattr(trained.config, "final_logit_softcapping", None)
    tanhs = [node for node in graph if node.op_type == "Tanh" and model_layer(node) == NO_LAYER]
    if len(tanhs) != (0 if cap is None else 1):
        yield f"the logits are capped by {len(tanhs)} tanh, expected {'none' if cap is None else f'one, of {cap:g}'}"
    for other in weights.others:
        if cap is not None and _caps_logits(other) and not np.all(other.read() == np.float32(cap)):
            found = float(other.read().reshape(-1)[0])
            yield f"the logits' cap is {found:.6g}, expected {cap:g} (node {other.node.name})"


def _caps_logits(other: OtherConstant) -> bool:
    return other.module == NO_LAYER and other.node.op_type in ("Mul", "Div")


def _other_problem(other: OtherConstant, trained: PreTrainedModel) -> str | None:
    node = other.node
    if explained_by_masks(node) or other.module.endswith(".act_fn"):
        return None
    if _caps_logits(other) and getattr(trained.config, "final_logit_softcapping", None) is not None:
        return None
    if other.module.endswith("embed_tokens") and node.op_type == "Mul":
        scale = getattr(submodule(trained, other.module), "embed_scale", None)
        expected = 1.0 if scale is None else float(scale)
        found = other.read()
        if found.size == 1 and np.all(found == np.float32(expected)):
            return None
        return f"the embeddings are scaled by {found.reshape(-1)[:4]}, expected {expected:.6g}"
    if "rotary_emb" in other.module or _scales_rotation(node):
        return None  # of every rotation, `rotary_problem` compares what its angles are made of
    what = f"input {other.index} of node {node.name} ({node.op_type}, {other.module})"
    return f"a constant that no parameter of the model explains: {what}"


def _scales_rotation(node: ir.Node) -> bool:
    """Whether `node` multiplies cosines or sines by a constant."""
    producers = [value.producer() for value in node.inputs if value is not None]
    return node.op_type == "Mul" and any(p is not None and p.op_type in ("Cos", "Sin") for p in producers)
