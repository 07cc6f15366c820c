"""Lower a portable decoder for ONNX Runtime's CPU provider: its own attention operator, over the same buffers.

In: a portable receiver or sharer graph, float32. Out: the same graph, changed in place, and how often each rule
applied. What a rule should have matched and did not is an error of the build, not a slow engine. Integer weights come
after, see `engines.ort.quantize`.
"""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

from c2c_export.errors import C2CError
from engines.model_layers import model_layer
from engines.ort.attention_rule import DOMAIN, FuseAttention, RowsInUse
from engines.ort.layout_rules import HEADS_FIRST, NORM_RULE, RESHAPE_RULE, ROTARY_RULE, TRANSPOSE_RULES
from engines.targets import FAST_HEAD_SIZE_MULTIPLE

_DOMAIN_VERSION = 1
_ATTENTION = "GroupQueryAttention"
_UNFUSED = {"ReduceMean": "its norm is no RMSNormalization", "Neg": "its rotation is no RotaryEmbedding"}
"""Operators that a decoder has only where a pass of the export did not match."""
_UNFUSED_IN_FUSER = {
    "ReduceMean": "its norm is no RMSNormalization",
    "Greater": "its gate is computed, and was not folded",
}


def lower_decoder(model: ir.Model) -> dict[str, int]:
    """Lower `model` in place; return how often each rule applied, by name.

    A model whose head size the operator does not take stays as it is, and no rule applies. Raises
    `C2CError` naming the layer where an attention, a norm or a rotation was not matched, here or by the export.
    """
    model.opset_imports[DOMAIN] = _DOMAIN_VERSION
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    # Nodes that an earlier rule wrote carry no shapes.
    common.ShapeInferencePass()(model)
    _check_export(model.graph)
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    if any(_head_size(node) % FAST_HEAD_SIZE_MULTIPLE for node in attentions):
        return {}
    counts = {"norm_before_transpose": _apply(model, NORM_RULE), "rotary_before_transpose": _apply(model, ROTARY_RULE)}
    if attentions:
        counts["fuse_attention"] = _apply(model, FuseAttention.rule(RowsInUse(model.graph)))
    common.ShapeInferencePass()(model)
    counts["remove_transposes"] = _apply(model, *TRANSPOSE_RULES)
    common.IdentityEliminationPass()(model)
    common.ShapeInferencePass()(model)
    counts["remove_reshapes"] = _apply(model, RESHAPE_RULE)
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _check(model.graph)
    return counts


def check_fuser(model: ir.Model) -> None:
    """Raise `C2CError`, naming the layer, for a norm or a gate that a pass of the export should have matched."""
    _check_fused(model.graph, _UNFUSED_IN_FUSER)


def _apply(model: ir.Model, *rules: RewriteRule) -> int:
    return RewriteRuleSet(list(rules)).apply_to_model(model)


def _head_size(attention: ir.Node) -> int:
    query = attention.inputs[0]
    assert query is not None
    assert query.shape is not None
    return int(query.shape[3])


def _check_export(graph: ir.Graph) -> None:
    """Raise `C2CError`, naming the layer, for what a pass of the export should have matched and did not.

    That is a norm, a rotation, or the choice of the last token: what only the logits need must be computed of one.
    """
    _check_fused(graph, _UNFUSED)
    if all(output.name != "logits" for output in graph.outputs):
        return
    last = [node for node in graph if node.op_type == "Attention"][-1:]
    later = {output for node in last for output in node.outputs}
    for node in graph:
        if not later.isdisjoint(node.inputs):
            later.update(node.outputs)
            shape = node.outputs[0].shape
            if node.op_type == "MatMul" and (shape is None or shape[1] != 1):
                raise C2CError(
                    f"layer {model_layer(node)}: its product is computed of every token, not of the last; export the "
                    "bundle again"
                )


def _check_fused(graph: ir.Graph, unfused: Mapping[str, str]) -> None:
    for node in graph:
        if node.op_type in unfused:
            raise C2CError(f"layer {model_layer(node)}: {unfused[node.op_type]}; export the bundle again")


def _check(graph: ir.Graph) -> None:
    """Raise `C2CError`, naming the layer, for what a rule should have matched and did not."""
    for node in graph:
        if node.op_type == "Attention":
            raise C2CError(f"layer {model_layer(node)}: its attention has no form that ONNX Runtime's operator covers")
        if node.op_type in ("RMSNormalization", "RotaryEmbedding") and _is_heads_first(node.inputs[0]):
            raise C2CError(
                f"layer {model_layer(node)}: its {node.op_type} was not moved before the heads' transposition"
            )
        if node.op_type == _ATTENTION and (transposed := next(filter(_is_heads_first, node.inputs[:3]), None)):
            raise C2CError(f"layer {model_layer(node)}: {transposed.name} is transposed before its attention")


def _is_heads_first(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return (
        producer is not None
        and producer.op_type == "Transpose"
        and tuple(producer.attributes.get_ints("perm")) == HEADS_FIRST
    )
