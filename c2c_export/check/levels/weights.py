"""Level `weights`: every trained parameter is in every graph of the engine, which holds and connects nothing else.

In: the graphs that the engine runs, the portable ones that engines are built from, and the trained models and fusers.
Out: how many parameters were compared, and a divergence for each that is missing, another, or more than its format's
rounding off; for each norm epsilon, rotation, scale, mask and activation that is not the model's; and for each cache or
correction that comes from elsewhere than the checkpoint's layer map and gates say. Whatever the precision, the bounds
are those of `c2c_export.check.graph.rounding`.

Not covered: the arithmetic between the constants, which the level `graphs` compares by its results; and what is in
files that TensorRT wrote: for its engines the graphs are those that they were built from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from transformers import PreTrainedModel

from c2c_export.check.graph.decoder_constants import check_decoder_constants
from c2c_export.check.graph.decoder_wiring import check_decoder_wiring
from c2c_export.check.graph.fuser_wiring import check_fuser_constants, check_fuser_wiring, open_gates
from c2c_export.check.graph.masks import check_masks
from c2c_export.check.graph.needed import decoder_parameters, fuser_parameters, receiver_caches, sharer_caches
from c2c_export.check.graph.parameters import check_parameters
from c2c_export.check.graph.shapes import check_shapes
from c2c_export.check.graph.weights import read_graph_weights
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.tolerances import measured
from c2c_export.check_record import Divergence
from c2c_export.checkpoint import FuserCheckpoint

_TrainedGraphs = dict[str, PreTrainedModel | FuserCheckpoint]
"""What each graph is traced from, by its name."""
_SHOWN = 8
"""Divergences that are told of each graph, the first ones; the measurements count all."""


@dataclass(frozen=True)
class _Found:
    """What is wrong with one graph."""

    num_parameters: int
    wrong_parameters: Sequence[Divergence]
    others: Sequence[Divergence]


def check_weights(context: CheckContext) -> LevelResult:
    """See the module's docstring. Raises `C2CError` where a graph cannot be read."""
    trained = _trained_graphs(context)
    others = [*_graph_differences(context, trained), *_changed_sources(context)]
    shown, num_parameters, num_wrong, num_others = list(others), 0, 0, len(others)
    for name in [name for name in context.record.graphs if name in trained]:
        engine = _check_graph(context, trained, name, context.engine.model(name), context.record.precision)
        portable = _check_portable(context, trained, name)
        num_parameters += engine.num_parameters
        num_wrong += len(engine.wrong_parameters) + len(portable.wrong_parameters)
        num_others += len(engine.others) + len(portable.others)
        for found, path in ((engine, None), (portable, context.bundle.manifest.graphs[name].path)):
            divergences = [*found.wrong_parameters, *found.others][:_SHOWN]
            shown += divergences if path is None else [_in_file(divergence, path) for divergence in divergences]
    precision = context.record.precision
    return LevelResult(
        measurements=(
            measured("weights", "parameters compared", precision, num_parameters),
            measured("weights", "wrong parameters", precision, num_wrong),
            measured("weights", "wrong constants and connections", precision, num_others),
        ),
        divergences=shown,
    )


def _trained_graphs(context: CheckContext) -> _TrainedGraphs:
    """The graphs that an engine of the trained pair has, and what each is traced from."""
    trained: _TrainedGraphs = {"receiver": context.trained.receiver.model}
    for number, (sharer, fuser) in enumerate(zip(context.trained.sharers, context.trained.fusers, strict=True)):
        if open_gates(fuser.checkpoint):
            trained |= {f"sharer{number}": sharer.model, f"fuser{number}": fuser.checkpoint}
    return trained


def _graph_differences(context: CheckContext, expected: _TrainedGraphs) -> Iterator[Divergence]:
    for name in sorted(expected.keys() - context.record.graphs.keys()):
        yield Divergence(graph=name, message=f"the engine has no graph {name}, although its fuser has open gates")
    for name in sorted(context.record.graphs.keys() - expected.keys()):
        yield Divergence(graph=name, message=f"the engine has a graph {name}, although its fuser has no open gate")


def _changed_sources(context: CheckContext) -> Iterator[Divergence]:
    """Portable graphs that are no longer those that the engine was built from."""
    files = context.bundle.manifest.files
    for path, digest in (context.record.build.sources if context.record.build else {}).items():
        if files.get(path) != digest:
            yield Divergence(message=f"{context.name} was built from another {path}; build it again with --rebuild")


def _check_portable(context: CheckContext, graphs: _TrainedGraphs, name: str) -> _Found:
    """The graph that engines are built from, unless it is the engine's own."""
    path = context.bundle.manifest.graphs[name].path
    if context.record.graphs[name] == path:
        return _Found(0, (), ())
    return _check_graph(context, graphs, name, ir.load(context.bundle.file(path)), "fp32")


def _in_file(divergence: Divergence, path: str) -> Divergence:
    return divergence.model_copy(update={"message": f"{path}: {divergence.message}"})


def _check_graph(context: CheckContext, graphs: _TrainedGraphs, name: str, graph: ir.Model, precision: str) -> _Found:
    trained, manifest = graphs[name], context.bundle.manifest
    shapes = check_shapes(name, graph, manifest.graphs[name])
    if isinstance(trained, FuserCheckpoint):
        separate = manifest.fusion_mode == "parallel" and len(manifest.sharers) > 1
        weights = read_graph_weights(graph)
        parameters = fuser_parameters(trained)
        others = [
            *shapes,
            *check_fuser_constants(name, graph, weights, trained),
            *check_fuser_wiring(name, graph, trained, separate_unfused=separate),
        ]
    else:
        has_logits = name == "receiver"
        number = int(name.removeprefix("sharer")) if not has_logits else 0
        caches = receiver_caches(trained) if has_logits else sharer_caches(context.trained.fusers[number].checkpoint)
        weights = read_graph_weights(graph, trained)
        parameters = decoder_parameters(trained, caches, has_logits=has_logits)
        others = [
            *shapes,
            *check_decoder_constants(name, graph, weights, trained),
            *check_masks(name, graph, trained),
            *check_decoder_wiring(name, graph, trained, caches, has_logits=has_logits),
        ]
    return _Found(len(weights.held), list(check_parameters(name, weights, parameters, precision)), others)
