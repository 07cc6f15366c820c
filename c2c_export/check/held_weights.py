"""The trained modules holding what an engine's graph holds: the same architecture, the graph's own dequantised weights.

In: the graph that an engine was built from, and a trained decoder or fuser. Out: one like it with the graph's weights,
and the names of those that it lacks: a weight that cannot be read, or does not fit the modules, stays the trained one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import onnx_ir as ir
from numpy.typing import NDArray

from c2c_export.check.graph.stored import UnreadableConstant
from c2c_export.check.graph.weights import GraphWeights, read_graph_weights
from c2c_export.check.trained.decoder import TrainedDecoder
from c2c_export.check.trained.fuser import TrainedFuser

_Trained = TypeVar("_Trained")


@dataclass(frozen=True, eq=False)
class Holding(Generic[_Trained]):
    """A decoder or fuser with a graph's weights."""

    trained: _Trained
    not_held: tuple[str, ...]
    """Weights that the graph has and this has not."""


def decoder_holding(graph: ir.Model, trained: TrainedDecoder) -> Holding[TrainedDecoder]:
    """`trained` with the weights of `graph`; what the graph lacks, as a pruned sharer's does, stays as it was."""
    parameters = trained.model.named_parameters(remove_duplicate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    fitting, not_held = _fitting(read_graph_weights(graph, trained.model), shapes)
    return Holding(trained.holding(fitting), not_held)


def fuser_holding(graph: ir.Model, trained: TrainedFuser) -> Holding[TrainedFuser]:
    """`trained` with the weights of `graph`; closed branches, which the graph lacks, stay as they were."""
    shapes = {
        f"{index}.{name}": tuple(tensor.shape)
        for index, projector in trained.checkpoint.projectors.items()
        for name, tensor in projector.state.items()
    }
    fitting, not_held = _fitting(read_graph_weights(graph), shapes)
    return Holding(trained.holding(fitting), not_held)


def _fitting(
    weights: GraphWeights, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """The weights that fit, by name, and the names of the others."""
    fitting: dict[str, NDArray[Any]] = {}
    for name, held in weights.held.items():
        try:
            value = held[0].parameter()
        except UnreadableConstant:
            continue
        if shapes.get(name) == value.shape:
            fitting[name] = value
    return fitting, tuple(name for name in weights.held if name not in fitting)
