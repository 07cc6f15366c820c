"""Parse a lowered ONNX graph with TensorRT, and assert from the parsed network that it is what was meant.

In: the module `tensorrt` or `tensorrt_rtx` and an ONNX file, strongly typed (`engines.precision`). Out: a network, and
the `LayerCounts` that were found in it:

- every `Attention`, `TensorScatter` and `RotaryEmbedding` of the graph is a native layer of the network, no more and no
  fewer. A graph holds one attention, two cache updates and two rotations for each decoder layer, less what
  `prune_sharer` took from the last one;
- every network input is used, and from GPU memory. TensorRT accepts some optional inputs and ignores them;
- every cache output is the output of a cache update of its own input, which makes the two one memory.

Names of TensorRT and of ONNX are turned into the model's own, such as `model.layers.3.self_attn.q_proj`. Not covered:
optimisation profiles and building (`engines.trt.build`).
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from c2c_export.bundle import LayerCounts
from c2c_export.errors import C2CError, one_line
from engines.model_layers import model_layer

_PAST = "past_"
_MAX_REASON = 400
"""Characters of TensorRT's reason that a message keeps."""


class GraphNames:
    """The nodes of an ONNX graph by name, with the model's layer of each, for messages."""

    def __init__(self, model: ir.Model) -> None:
        self._layers = {node.name: model_layer(node) for node in model.graph if node.name}
        self._operators = {node.name: node.op_type for node in model.graph if node.name}

    def describe(self, node: str) -> str:
        """For example `node node_linear_2 (MatMul, layer model.layers.0.self_attn.v_proj)`."""
        return f"node {node} ({self._operators[node]}, layer {self._layers[node]})"

    def mentioned(self, text: str) -> list[str]:
        """The nodes that a message of TensorRT mentions, in its order.

        TensorRT calls its layers by their node's name with a suffix (`node_1_AttentionInput`), fused ones by the first
        and the last of them (`{ForeignNode[a...b]}`).
        """
        found = []
        for word in re.split(r"[^\w.\-/:]+|\.\.\.", text):
            parts = word.split("_")
            prefixes = ("_".join(parts[:length]) for length in range(len(parts), 0, -1))
            name = next((prefix for prefix in prefixes if prefix in self._layers), None)
            if name is not None and name not in found:
                found.append(name)
        return found


def expected_layers(model: ir.Model) -> LayerCounts:
    """How many native layers the network of an ONNX graph must have. `total` is the number of nodes."""
    counts = Counter(node.op_type for node in model.graph)
    return LayerCounts(
        attention=counts["Attention"],
        cache_updates=counts["TensorScatter"],
        rotary=counts["RotaryEmbedding"],
        total=sum(counts.values()),
    )


def head_sizes(model: ir.Model) -> set[int]:
    """The head sizes of the graph's attentions."""
    keys = (node.inputs[1] for node in model.graph if node.op_type == "Attention")
    return {int(key.shape[3]) for key in keys if key is not None and key.shape is not None}


@dataclass(frozen=True)
class Parsed:
    """A network, kept together with the parser whose weights it refers to."""

    network: Any
    parser: Any


def parse(trt: Any, builder: Any, log: Any, path: Path, names: GraphNames) -> Parsed:
    """Parse the ONNX file at `path`, its external weights included, into a strongly typed network of `builder`.

    `log` is a logger with `take()`, the errors since the last call. Raises `C2CError` with the ONNX node and the
    model's layer at which the parser stopped, and why.
    """
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return Parsed(network, parser)
    logged = log.take()
    if parser.num_errors == 0:
        raise C2CError(f"{path.name}: TensorRT's parser refuses the graph: {shorten(logged) or 'it gave no reason'}")
    error = parser.get_error(0)
    nodes = names.mentioned(f"{error.node_name()} {error.desc()}")
    where = names.describe(nodes[0]) if nodes else "the graph"
    raise C2CError(f"{path.name}: TensorRT's parser refuses {where}: {shorten(error.desc())}")


def check(trt: Any, network: Any, expected: LayerCounts, graph_name: str) -> LayerCounts:
    """Assert what the module's docstring lists; return the layers found. Raises `C2CError` naming what differs."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = Counter(layer.type for layer in layers)
    found = LayerCounts(
        attention=kinds[trt.LayerType.ATTENTION_INPUT],
        cache_updates=kinds[trt.LayerType.KV_CACHE_UPDATE],
        rotary=kinds[trt.LayerType.ROTARY_EMBEDDING],
        total=len(layers),
    )
    for field in ("attention", "cache_updates", "rotary"):
        if getattr(found, field) != getattr(expected, field):
            raise C2CError(
                f"{graph_name}: TensorRT parsed {getattr(found, field)} native {field.replace('_', ' ')} layers, "
                f"expected {getattr(expected, field)}; this version of TensorRT does not keep these operators"
            )
    _check_inputs_are_used(network, layers, graph_name)
    _check_caches_alias(trt, network, layers, graph_name)
    return found


def cache_aliases(trt: Any, network: Any) -> dict[str, str]:
    """The network inputs by the output that TensorRT writes in place into their memory."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return {
        layer.get_output(0).name: layer.get_input(0).name
        for layer in layers
        if layer.type == trt.LayerType.KV_CACHE_UPDATE
    }


def allow_several_attention_kernels(trt: Any, network: Any) -> None:
    """Let TensorRT take several kernels for an attention that it has no single one for."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give the base class
            layer.attention.decomposable = True


def shorten(text: str) -> str:
    """TensorRT's reason in one line, without the addresses of its source files, cut to some hundred characters."""
    return one_line(re.sub(r"\(?\[?[\w/.]+\.(cpp|h|cc)\b[^\s\])]*\]?\)?", " ", text), _MAX_REASON)


def _strongly_typed(trt: Any) -> int:
    # Newer versions know no other kind of network and have dropped the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _check_inputs_are_used(network: Any, layers: list[Any], graph_name: str) -> None:
    read = {
        tensor.name
        for layer in layers
        for tensor in (layer.get_input(index) for index in range(layer.num_inputs))
        if tensor is not None
    }
    on_host = [tensor.name for tensor in _inputs(network) if tensor.is_shape_tensor]
    if on_host:
        raise C2CError(
            f"{graph_name}: TensorRT wants the input {', '.join(on_host)} in host memory, expected in the GPU's"
        )
    unused = [tensor.name for tensor in _inputs(network) if tensor.name not in read]
    if unused:
        raise C2CError(
            f"{graph_name}: TensorRT accepted but ignores the input {', '.join(unused)}; an engine would compute "
            "something else than the graph"
        )


def _check_caches_alias(trt: Any, network: Any, layers: list[Any], graph_name: str) -> None:
    aliases = cache_aliases(trt, network)
    updates = {layer.get_output(0).name: layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE}
    inputs = {tensor.name for tensor in _inputs(network)}
    for tensor in (network.get_output(index) for index in range(network.num_outputs)):
        if _PAST + tensor.name not in inputs:
            continue
        source = aliases.get(tensor.name)
        if source != _PAST + tensor.name or not updates[tensor.name].get_input(0).is_network_input:
            raise C2CError(
                f"{graph_name}: the output {tensor.name} is {f'written into {source}' if source else 'a copy'}, "
                f"expected TensorRT to write it into {_PAST + tensor.name} in place"
            )


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(index) for index in range(network.num_inputs)]
