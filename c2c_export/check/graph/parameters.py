"""Compare the weights that a graph holds with the trained ones, name by name.

In: a graph's weights, all trained parameters of its model or fuser, and the names of those that the graph needs. Out: a
`Divergence` for each that is missing, not needed, stored in a form that the precision does not have, or another; where
it is another parameter's, the message says so.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from c2c_export.check.graph.blocks import FloatArray
from c2c_export.check.graph.rounding import find_misfits
from c2c_export.check.graph.stored import Stored, UnreadableConstant
from c2c_export.check.graph.weights import GraphWeights, HeldWeight
from c2c_export.check_record import Divergence, Kind

_FLOATS = {
    "fp32": (ir.DataType.FLOAT,),
    "fp16": (ir.DataType.FLOAT, ir.DataType.FLOAT16),
    "bf16": (ir.DataType.FLOAT, ir.DataType.BFLOAT16),
    "int8": (ir.DataType.FLOAT, ir.DataType.FLOAT16),
    "int4": (ir.DataType.FLOAT, ir.DataType.FLOAT16),
}
_BITS = {"int8": (8,), "int4": (4, 8)}
"""In int4, embeddings and the LM head have 8."""


@dataclass(frozen=True)
class Place:
    """Where a parameter belongs, for a divergence."""

    layer: int | None
    kind: Kind | None


@dataclass(frozen=True, eq=False)
class Parameters:
    """The trained side: every parameter of a model or fuser, float32, by name."""

    values: Mapping[str, FloatArray]
    needed: Collection[str]
    """What the graph must hold, and all that it may hold."""
    places: Mapping[str, Place]


def check_parameters(graph: str, weights: GraphWeights, trained: Parameters, precision: str) -> Iterator[Divergence]:
    """See the module's docstring; parameters come in the order of the model."""
    for name in trained.values:
        held = weights.held.get(name, ())
        if name in trained.needed and not held and not _may_be_folded(name, trained.values[name]):
            yield _divergence(graph, name, trained, f"the graph does not hold {name}")
        if name not in trained.needed and held:
            node = held[0].node.name
            yield _divergence(graph, name, trained, f"the graph holds {name} (node {node}), which nothing needs")
        for weight in _distinct(held) if name in trained.needed else ():
            problem = _problem(weight, trained, precision)
            if problem:
                yield _divergence(graph, name, trained, f"{name}: {problem}")
    for name in sorted(weights.held.keys() - trained.values.keys()):
        node = weights.held[name][0].node.name
        yield Divergence(graph=graph, message=f"node {node} reads {name}, a parameter that the model does not have")


def _may_be_folded(name: str, values: FloatArray) -> bool:
    """Whether the exporter drops the parameter: adding a bias of zeros changes nothing."""
    return name.endswith(".bias") and not np.any(values)


def _distinct(held: Collection[HeldWeight]) -> list[HeldWeight]:
    """One of those that read the same constant in the same way."""
    return list({(weight.node.inputs[weight.index], weight.node.op_type): weight for weight in held}.values())


def _problem(weight: HeldWeight, trained: Parameters, precision: str) -> str | None:
    try:
        stored = weight.read()
    except UnreadableConstant as error:
        return str(error)
    expected = trained.values[weight.name]
    if stored.numbers.shape != expected.shape:
        return f"its shape is {list(stored.numbers.shape)}, expected {list(expected.shape)}"
    problem = _form_problem(stored, precision)
    if problem:
        return problem
    misfits = find_misfits(stored, _effective(expected, weight))
    if misfits is None:
        return None
    other = _looks_like(stored, weight, trained)
    return misfits.describe() + (f"; it holds {other} instead" if other else "")


def _form_problem(stored: Stored, precision: str) -> str | None:
    if stored.dtype not in _FLOATS[precision]:
        return f"it is stored in {stored.dtype.name}, which an engine in {precision} does not have"
    if stored.blocks is not None and stored.blocks.bits not in _BITS.get(precision, ()):
        return f"it is stored in {stored.blocks.bits} bits, which an engine in {precision} does not have"
    return None


def _effective(values: FloatArray, weight: HeldWeight) -> FloatArray:
    return values + np.float32(weight.added) if weight.added else values


def _looks_like(stored: Stored, weight: HeldWeight, trained: Parameters) -> str | None:
    """The name of another parameter that the graph holds here, the nearest by name first; None if it is none."""
    same_shape = [
        name for name, values in trained.values.items() if name != weight.name and values.shape == stored.numbers.shape
    ]
    own_layer = trained.places[weight.name].layer
    for name in sorted(same_shape, key=lambda name: trained.places[name].layer != own_layer):
        if find_misfits(stored, _effective(trained.values[name], weight)) is None:
            return name
    return None


def _divergence(graph: str, name: str, trained: Parameters, message: str) -> Divergence:
    place = trained.places[name]
    return Divergence(graph=graph, layer=place.layer, kind=place.kind, message=message)
