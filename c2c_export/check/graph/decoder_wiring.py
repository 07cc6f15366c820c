"""What a decoder's graph must connect, whatever its numbers are: caches, projections, attention.

In: the graph, the trained model and the caches that must be written. Out: a `Divergence` for each connection that is
another. Known by modules, so it covers portable and lowered graphs alike. Not covered: the order of operations inside
a layer, which `graphs` compares by its results.
"""

from collections.abc import Iterator, Sequence

import onnx_ir as ir
from transformers import PreTrainedModel

from c2c_export.check.graph.modules import decoder_layer
from c2c_export.check.graph.paths import PRODUCTS, follow_back, name_of, operand
from c2c_export.check_record import Divergence, Kind
from engines.model_layers import model_layer

CacheName = tuple[int, Kind]
_ATTENTIONS = ("Attention", "GroupQueryAttention")
_OTHER_INPUTS = frozenset(
    {"input_ids", "position_ids", "write_index", "kv_length", "last_token", "row_position_ids"},
)


def check_decoder_wiring(
    name: str, graph: ir.Model, trained: PreTrainedModel, caches: Sequence[CacheName], *, has_logits: bool
) -> Iterator[Divergence]:
    """What of the graph `name` is connected otherwise than the model; `caches` are those that it must write."""
    yield from _check_names(name, graph.graph, caches, has_logits=has_logits)
    outputs = {str(value.name): value for value in graph.graph.outputs}
    for layer, kind in caches:
        value = outputs.get(f"{kind}.{layer}")
        if value is not None:
            problem = _cache_problem(value, trained, layer, kind)
            if problem:
                yield Divergence(graph=name, layer=layer, kind=kind, message=f"{kind}.{layer} {problem}")
    for node in graph.graph:
        layer_of_node = decoder_layer(model_layer(node))
        if node.op_type in _ATTENTIONS:
            problem = _attention_problem(node, layer_of_node)
        elif node.op_type in PRODUCTS and model_layer(node).endswith(".o_proj"):
            problem = _output_projection_problem(node, layer_of_node)
        else:
            continue
        if problem:
            yield Divergence(graph=name, layer=layer_of_node, message=problem)


def _check_names(name: str, graph: ir.Graph, caches: Sequence[CacheName], *, has_logits: bool) -> Iterator[Divergence]:
    outputs = [str(value.name) for value in graph.outputs]
    expected = {f"{kind}.{layer}" for layer, kind in caches} | ({"logits"} if has_logits else set())
    yield from _differing_names(name, "output", set(outputs), expected)
    inputs = {str(value.name) for value in graph.inputs} - _OTHER_INPUTS
    yield from _differing_names(name, "input", inputs, {f"past_{kind}.{layer}" for layer, kind in caches})


def _differing_names(graph: str, what: str, found: set[str], expected: set[str]) -> Iterator[Divergence]:
    for wrong in sorted(found ^ expected):
        kind, _, layer = wrong.removeprefix("past_").partition(".")
        is_cache = kind in ("key", "value") and layer.isdecimal()
        yield Divergence(
            graph=graph,
            layer=int(layer) if is_cache else None,
            kind=_kind(kind) if is_cache else None,
            message=f"the graph has {'an' if wrong in found else 'no'} {what} {wrong}, which "
            + ("no open gate asks for" if wrong in found else "the layer map and the open gates ask for"),
        )


def _kind(text: str) -> Kind:
    return "key" if text == "key" else "value"


def _cache_problem(value: ir.Value, trained: PreTrainedModel, layer: int, kind: Kind) -> str | None:
    node = value.producer()
    if node is None or node.op_type not in ("TensorScatter", "GroupQueryAttention"):
        return "is not written by a cache update"
    if node.op_type == "TensorScatter":
        past, new = operand(node, 0), operand(node, 1)
        if name_of(operand(node, 2)) != "write_index" or node.attributes.get_int("axis", -2) not in (2, -2):
            return f"is written to other rows than those from write_index on, by node {node.name}"
    else:
        is_key = value is node.outputs[1]
        new, past = operand(node, 1 if is_key else 2), operand(node, 3 if is_key else 4)
    if name_of(past) != f"past_{kind}.{layer}":
        return f"is {name_of(past)} with new rows, expected past_{kind}.{layer} with new rows"
    path = follow_back(new)
    expected = f"model.layers.{layer}.self_attn.{'k' if kind == 'key' else 'v'}_proj"
    found = "no projection" if path.source is None else model_layer(path.source)
    if found != expected:
        swapped = {"k": "v", "v": "k"}[expected[-6]]
        what = ": keys and values are swapped" if found == f"{expected[:-6]}{swapped}_proj" else ""
        return f"takes its new rows from {found}, expected {expected}{what}"
    attention = trained.get_submodule(f"model.layers.{layer}.self_attn")
    num_norms = 1 if kind == "key" and getattr(attention, "k_norm", None) is not None else 0
    for op_type, what, expected_number in (
        ("RotaryEmbedding", "rotated", 1 if kind == "key" else 0),
        ("RMSNormalization", "normalised", num_norms),
    ):
        number = len(path.nodes(op_type))
        if number != expected_number:
            return f"is {what} {number} times on its way into the cache, expected {expected_number}"
    return None


def _attention_problem(node: ir.Node, layer: int | None) -> str | None:
    if node.op_type == "GroupQueryAttention":
        read = [name_of(value) for value in node.outputs[1:3]]
    else:
        read = [name_of(operand(node, 1)), name_of(operand(node, 2))]
    expected = [f"key.{layer}", f"value.{layer}"]
    if read != expected:
        swapped = ": keys and values are swapped" if read == expected[::-1] else ""
        return f"the attention of layer {layer} reads {' and '.join(read)}, expected {' and '.join(expected)}{swapped}"
    path = follow_back(node.inputs[0])
    found = "no projection" if path.source is None else model_layer(path.source)
    if found != f"model.layers.{layer}.self_attn.q_proj":
        return f"the attention of layer {layer} takes its queries from {found}, expected that layer's q_proj"
    if len(path.nodes("RotaryEmbedding")) != 1:
        return f"the queries of layer {layer} are rotated {len(path.nodes('RotaryEmbedding'))} times, expected once"
    return None


def _output_projection_problem(node: ir.Node, layer: int | None) -> str | None:
    source = follow_back(node.inputs[0]).source
    if source is None or source.op_type not in _ATTENTIONS or decoder_layer(model_layer(source)) != layer:
        found = "no attention" if source is None else f"{source.op_type} of {model_layer(source)}"
        return f"the output projection of layer {layer} reads {found}, expected that layer's attention"
    return None
