"""The trained modules holding what an engine's graph holds: the same architecture, the graph's own dequantised weights.

In: the graph that an engine was built from, and a trained decoder or fuser. Out: one like it with the graph's weights.
A weight that cannot be read, or does not fit the modules, stays the trained one: the level `weights` names it.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from c2c_export.check.graph.stored import UnreadableConstant
from c2c_export.check.graph.weights import GraphWeights, read_graph_weights
from c2c_export.check.trained.decoder import TrainedDecoder
from c2c_export.check.trained.fuser import TrainedFuser


def decoder_holding(graph: ir.Model, trained: TrainedDecoder) -> TrainedDecoder:
    """`trained` with the weights of `graph`; what the graph lacks, as a pruned sharer's does, stays as it was."""
    parameters = trained.model.named_parameters(remove_duplicate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    return trained.holding(_fitting(read_graph_weights(graph, trained.model), shapes))


def fuser_holding(graph: ir.Model, trained: TrainedFuser) -> TrainedFuser:
    """`trained` with the weights of `graph`; closed branches, which the graph lacks, stay as they were."""
    shapes = {
        f"{index}.{name}": tuple(tensor.shape)
        for index, projector in trained.checkpoint.projectors.items()
        for name, tensor in projector.state.items()
    }
    return trained.holding(_fitting(read_graph_weights(graph), shapes))


def _fitting(weights: GraphWeights, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    fitting = {}
    for name, held in weights.held.items():
        try:
            value = held[0].parameter()
        except UnreadableConstant:
            continue
        if shapes.get(name) == value.shape:
            fitting[name] = value
    return fitting
