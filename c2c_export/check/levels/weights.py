"""Level `weights`: every trained parameter is in every graph of the engine, which holds and connects nothing else.

In: the graphs that the engine was built from, and the trained models and fusers. Out: how many parameters were
compared, and a divergence for each that is missing, another, or more than its format's rounding off; for each norm
epsilon, rotation, scale, mask and activation that is not the model's; and for each cache or correction that comes from
elsewhere than the checkpoint's layer map and gates say. Whatever the precision, the bounds are those of
`c2c_export.check.graph.rounding`.

Not covered: the arithmetic between the constants, which the level `graphs` compares by its results.
"""

import re
from collections.abc import Iterator
from itertools import chain

import onnx_ir as ir
from transformers import PreTrainedModel

from c2c_export.check.graph.decoder_constants import check_decoder_constants
from c2c_export.check.graph.decoder_wiring import CacheName, check_decoder_wiring
from c2c_export.check.graph.fuser_wiring import check_fuser_constants, check_fuser_wiring, open_gates
from c2c_export.check.graph.masks import check_masks
from c2c_export.check.graph.modules import decoder_kind, decoder_layer, projector_side
from c2c_export.check.graph.parameters import Parameters, Place, check_parameters
from c2c_export.check.graph.weights import GraphWeights, read_graph_weights
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check_record import Divergence, Measurement
from c2c_export.checkpoint import FuserCheckpoint

_SHOWN = 8
"""Divergences that are told of each graph, the first ones; the measurements count all."""


def check_weights(context: CheckContext) -> LevelResult:
    """See the module's docstring. Raises `C2CError` where a graph cannot be read."""
    shown = list(_missing_graphs(context))
    num_parameters, num_wrong, num_other = 0, 0, len(shown)
    for name in context.record.graphs:
        if name not in _graphs(context):
            continue
        graph = context.engine.model(name)
        wrong, other, weights = _check_graph(context, name, graph)
        num_parameters += len(weights.held)
        num_wrong, num_other = num_wrong + len(wrong), num_other + len(other)
        shown.extend([*wrong, *other][:_SHOWN])
    return LevelResult(
        measurements=(
            Measurement(name="parameters compared", value=num_parameters),
            Measurement(name="wrong parameters", value=num_wrong, at_most=0),
            Measurement(name="wrong constants and connections", value=num_other, at_most=0),
        ),
        divergences=shown,
    )


def _graphs(context: CheckContext) -> dict[str, PreTrainedModel | FuserCheckpoint]:
    """The graphs that an engine of the trained pair has, and what each is traced from."""
    trained: dict[str, PreTrainedModel | FuserCheckpoint] = {"receiver": context.trained.receiver.model}
    for number, (sharer, fuser) in enumerate(zip(context.trained.sharers, context.trained.fusers, strict=True)):
        if open_gates(fuser.checkpoint):
            trained |= {f"sharer{number}": sharer.model, f"fuser{number}": fuser.checkpoint}
    return trained


def _missing_graphs(context: CheckContext) -> Iterator[Divergence]:
    expected = _graphs(context)
    for name in expected.keys() - context.record.graphs.keys():
        yield Divergence(graph=name, message=f"the engine has no graph {name}, although its fuser has open gates")
    for name in context.record.graphs.keys() - expected.keys():
        yield Divergence(graph=name, message=f"the engine has a graph {name}, although its fuser has no open gate")


def _check_graph(
    context: CheckContext, name: str, graph: ir.Model
) -> tuple[list[Divergence], list[Divergence], GraphWeights]:
    """Wrong parameters, all else that is wrong, and what the graph holds."""
    trained, precision = _graphs(context)[name], context.record.precision
    if isinstance(trained, FuserCheckpoint):
        manifest = context.bundle.manifest
        separate = manifest.fusion_mode == "parallel" and len(manifest.sharers) > 1
        weights = read_graph_weights(graph)
        wrong = list(check_parameters(name, weights, _fuser_parameters(trained), precision))
        other = [
            *check_fuser_constants(name, graph, trained),
            *_unexplained(name, weights),
            *check_fuser_wiring(name, graph, trained, separate_unfused=separate),
        ]
        return wrong, other, weights
    caches = _caches(context, name, trained)
    weights = read_graph_weights(graph, trained)
    parameters = _decoder_parameters(trained, caches, is_receiver=name == "receiver")
    wrong = list(check_parameters(name, weights, parameters, precision))
    other = list(
        chain(
            check_decoder_constants(name, graph, weights, trained),
            check_masks(name, graph, trained),
            check_decoder_wiring(name, graph, trained, caches, has_logits=name == "receiver"),
        )
    )
    return wrong, other, weights


def _unexplained(name: str, weights: GraphWeights) -> Iterator[Divergence]:
    """A fuser's graph has no constants but its weights."""
    for other in weights.others:
        what = f"input {other.index} of node {other.node.name} ({other.node.op_type}, {other.module})"
        yield Divergence(graph=name, message=f"a constant that no parameter of the fuser explains: {what}")


def _caches(context: CheckContext, name: str, model: PreTrainedModel) -> list[CacheName]:
    """The caches that a decoder's graph writes: all of a receiver's, of a sharer's what its fuser's open gates need."""
    layers = range(model.config.num_hidden_layers)
    if name == "receiver":
        return [(layer, kind) for layer in layers for kind in ("key", "value")]
    gates = open_gates(context.trained.fusers[int(re.sub(r"\D", "", name))].checkpoint)
    read: set[CacheName] = {(gate.link.sharer_layer, gate.kind) for gate in gates}
    highest = max(layer for layer, _ in read)
    every: list[CacheName] = [(layer, kind) for layer in range(highest + 1) for kind in ("key", "value")]
    return [cache for cache in every if cache[0] < highest or cache in read]


def _decoder_parameters(model: PreTrainedModel, caches: list[CacheName], *, is_receiver: bool) -> Parameters:
    values = {name: tensor.detach().numpy() for name, tensor in model.named_parameters(remove_duplicate=False)}
    needed = set(values)
    if not is_receiver:
        highest = max(layer for layer, _ in caches)
        kinds = {kind for layer, kind in caches if layer == highest}

        def is_needed(name: str) -> bool:
            layer = decoder_layer(name)
            if layer is None:
                return "embed_tokens" in name
            return layer < highest or (
                layer == highest and (decoder_kind(name) in kinds or ".input_layernorm." in name)
            )

        needed = set(filter(is_needed, values))
    places = {name: Place(decoder_layer(name), decoder_kind(name)) for name in values}
    return Parameters(values, needed, places)


def _fuser_parameters(fuser: FuserCheckpoint) -> Parameters:
    layers = {link.projector: link.receiver_layer for link in fuser.links}
    values, places = {}, {}
    for projector, weights in fuser.projectors.items():
        for state_name, tensor in weights.state.items():
            name = f"{projector}.{state_name}"
            side = projector_side(name)
            assert side is not None, "every tensor of a projector belongs to one side"
            if not state_name.endswith("gate_logit"):
                values[name] = tensor.numpy()
                places[name] = Place(layers[projector], side.kind)
    is_open = {(gate.link.projector, gate.kind) for gate in open_gates(fuser)}
    needed = {name for name in values if (side := projector_side(name)) and (side.projector, side.kind) in is_open}
    return Parameters(values, needed, places)
