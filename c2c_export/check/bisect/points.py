"""The values of an ONNX graph that are some module's input or output, in the order in which they are computed.

In: a graph whose nodes name the modules they were traced from, portable or lowered. Out: `Point`s:

- what leaves a module: the one floating-point value that its nodes give to others;
- what a product of a module reads, as attention gives it to its output projection;
- the new keys and values that are written into a cache.

Not covered: shapes. A graph may hold a value with its heads first, or of the last token alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from engines.model_layers import NO_LAYER, model_layer

_PRODUCTS = ("MatMul", "MatMulNBits", "FusedMatMul", "Gemm")
_CACHE_WRITES = {"TensorScatter": (1,), "GroupQueryAttention": (1, 2)}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, eq=False)
class Point:
    """A value of the graph, and what it must equal."""

    value: ir.Value
    node: ir.Node
    """What computes it."""
    module: str
    """The module that gives it, or reads it."""
    is_input: bool = False
    """Whether it is what the module reads."""
    cache: str | None = None
    """The cache whose new rows it is, such as `key.3`."""


def points_of(model: ir.Model) -> list[Point]:
    """See the module's docstring; of several that are one value, the first kind."""
    order = {node: index for index, node in enumerate(model.graph)}
    found: dict[ir.Value, Point] = {}
    for point in (*_outputs(model), *_cache_rows(model), *_inputs(model)):
        found.setdefault(point.value, point)
    return sorted(found.values(), key=lambda point: order[point.node])


def _outputs(model: ir.Model) -> Iterator[Point]:
    leaving: dict[str, list[ir.Value]] = {}
    for node in model.graph:
        modules = _modules(node)
        for value in node.outputs:
            if value.dtype not in _FLOATS:
                continue
            used = [_modules(use.node) for use in value.uses()]
            for module in modules:
                if value.is_graph_output() or any(module not in others for others in used):
                    leaving.setdefault(module, []).append(value)
    for module, values in leaving.items():
        # Attention also gives the caches.
        values = [value for value in values if not value.is_graph_output() or value.name == "logits"]
        node = values[0].producer() if len(values) == 1 else None
        if node is not None:
            yield Point(values[0], node, module)


def _cache_rows(model: ir.Model) -> Iterator[Point]:
    for node in model.graph:
        for index in _CACHE_WRITES.get(node.op_type, ()):
            value = node.inputs[index]
            written = node.outputs[0 if node.op_type == "TensorScatter" else index]
            producer = None if value is None else value.producer()
            if value is not None and producer is not None and written.name is not None:
                yield Point(value, producer, model_layer(producer), cache=written.name)


def _inputs(model: ir.Model) -> Iterator[Point]:
    for node in model.graph:
        value = _activations(node) if node.op_type in _PRODUCTS else None
        producer = None if value is None else value.producer()
        if value is not None and producer is not None and model_layer(node) != NO_LAYER:
            yield Point(value, producer, model_layer(node), is_input=True)


def _activations(product: ir.Node) -> ir.Value | None:
    """What a product multiplies; without the sums that 4-bit weights with offsets want behind it."""
    value = product.inputs[0]
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Concat" and len(producer.inputs) == 2:
        sums = producer.inputs[1]
        if sums is not None and (node := sums.producer()) is not None and node.op_type == "ReduceSum":
            return producer.inputs[0]
    return value


def _modules(node: ir.Node) -> list[str]:
    """The module that a node was traced from, and those that it lies in."""
    module = model_layer(node)
    if module == NO_LAYER:
        return []
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
