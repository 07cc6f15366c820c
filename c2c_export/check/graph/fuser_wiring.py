"""What a fuser's graph must connect and compute beside its weights: links, gates, norms, activations.

In: the graph, the checkpoint, and whether its projectors read the receiver's unfused rows apart. Out: a `Divergence`
for each correction that comes from another projector or sharer layer, or is missing, and for each constant that is
another. Links and gates are those of the checkpoint, not of the manifest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from c2c_export.check.graph.modules import ProjectorSide, projector_side
from c2c_export.check.graph.norms import epsilon_problem
from c2c_export.check.graph.paths import PRODUCTS, ancestors, name_of, operand
from c2c_export.check.graph.weights import GraphWeights
from c2c_export.check_record import Divergence, Kind
from c2c_export.checkpoint import FuserCheckpoint, ProjectorLink
from engines.model_layers import model_layer

_NORM_EPSILON = 1e-6
"""Of the reference's blocks; a checkpoint does not name it."""


@dataclass(frozen=True)
class OpenGate:
    """A correction that the checkpoint adds: `link`'s, to the keys or to the values."""

    link: ProjectorLink
    kind: Kind

    @property
    def output(self) -> str:
        """The graph's output with the corrected cache."""
        return f"{self.kind}.{self.link.receiver_layer}"


def open_gates(fuser: FuserCheckpoint) -> list[OpenGate]:
    """The corrections that a fuser adds, by receiver layer, keys first."""
    gates = []
    for link in fuser.links:
        projector = fuser.projectors[link.projector]
        gates += [OpenGate(link, "key")] if projector.key_gate_open else []
        gates += [OpenGate(link, "value")] if projector.value_gate_open else []
    return gates


def check_fuser_wiring(
    name: str, graph: ir.Model, fuser: FuserCheckpoint, *, separate_unfused: bool
) -> Iterator[Divergence]:
    """What of the graph `name` is connected otherwise than the checkpoint says."""
    gates = open_gates(fuser)
    outputs = {str(value.name): value for value in graph.graph.outputs}
    for gate in gates:
        value = outputs.get(gate.output)
        problem = None if value is None else _correction_problem(value, fuser, gate, separate_unfused=separate_unfused)
        if problem:
            layer = gate.link.receiver_layer
            yield Divergence(graph=name, layer=layer, kind=gate.kind, message=f"{gate.output} {problem}")
    yield from _check_names(name, graph.graph, fuser, gates, separate_unfused=separate_unfused)


def check_fuser_constants(
    name: str, graph: ir.Model, weights: GraphWeights, fuser: FuserCheckpoint
) -> Iterator[Divergence]:
    """Norm epsilons and activations that are not the reference's; and constants that are no weights: there are none."""
    for other in weights.others:
        what = f"input {other.index} of node {other.node.name} ({other.node.op_type}, {other.module})"
        yield Divergence(graph=name, message=f"a constant that no parameter of the fuser explains: {what}")
    layers = {link.projector: link.receiver_layer for link in fuser.links}
    for node in graph.graph:
        problem = None
        if node.op_type == "RMSNormalization":
            problem = epsilon_problem(node, _NORM_EPSILON)
        elif node.op_type == "Gelu" and node.attributes.get_string("approximate", "none") != "none":
            problem = "its GELU is approximated by tanh, expected the exact one (erf)"
        if problem:
            side = projector_side(model_layer(node))
            yield Divergence(
                graph=name,
                layer=None if side is None else layers.get(side.projector),
                kind=None if side is None else side.kind,
                message=f"{model_layer(node)}: {problem}",
            )


def _check_names(
    name: str, graph: ir.Graph, fuser: FuserCheckpoint, gates: list[OpenGate], *, separate_unfused: bool
) -> Iterator[Divergence]:
    linked = {link.receiver_layer: link for link in fuser.links}
    expected = {gate.output for gate in gates}
    for wrong in sorted({str(value.name) for value in graph.outputs} ^ expected):
        kind, _, number = wrong.partition(".")
        layer = int(number) if number.isdecimal() else None
        link = None if layer is None else linked.get(layer)
        if kind not in ("key", "value") or link is None:
            yield Divergence(graph=name, layer=layer, message=f"the graph has an output {wrong}, which no link has")
            continue
        logit = float(fuser.projectors[link.projector].state[f"{kind}_gate_logit"])
        is_open = "open" if wrong not in expected else "closed"
        yield Divergence(
            graph=name,
            layer=layer,
            kind="key" if kind == "key" else "value",
            message=f"the gate of layer {layer}'s {kind} is {is_open} in the graph; its trained logit is {logit:.6g}",
        )
    inputs = {"sharer_rows", "receiver_rows", "write_index"}
    for gate in gates:
        inputs |= {f"sharer_{gate.kind}.{gate.link.sharer_layer}", f"past_{gate.output}"}
        inputs |= {f"unfused_{gate.output}"} if separate_unfused else set()
    for wrong in sorted({str(value.name) for value in graph.inputs} ^ inputs):
        lacks = wrong in inputs
        yield Divergence(
            graph=name,
            message=f"the graph has {'no' if lacks else 'an'} input {wrong}, which the layer map and the open gates "
            f"{'ask for' if lacks else 'do not ask for'}",
        )


def _correction_problem(
    value: ir.Value, fuser: FuserCheckpoint, gate: OpenGate, *, separate_unfused: bool
) -> str | None:
    node = value.producer()
    if node is None or node.op_type != "TensorScatter":
        return "is not written by a cache update"
    past, write_index = name_of(operand(node, 0)), name_of(operand(node, 2))
    if past != f"past_{gate.output}" or write_index != "write_index":
        return f"is {past} with rows written from {write_index} on, expected past_{gate.output} and write_index"
    nodes, inputs = ancestors(operand(node, 1))
    sides = {projector_side(model_layer(node)) for node in nodes if node.op_type in PRODUCTS}
    expected_side = ProjectorSide(gate.link.projector, gate.kind)
    if not sides:
        return f"has no correction added; the gate of its projector {gate.link.projector} is open"
    if sides != {expected_side}:
        found = " and ".join(_described(side) for side in sorted(sides, key=str))
        return f"is corrected by {found}, expected {_described(expected_side)}"
    expected = {"sharer_rows", "receiver_rows", f"sharer_{gate.kind}.{gate.link.sharer_layer}", f"past_{gate.output}"}
    expected |= {f"unfused_{gate.output}"} if separate_unfused else set()
    if inputs != expected:
        return _wrong_inputs(inputs, expected, gate, fuser)
    concatenation = [n for n in nodes if n.op_type == "Concat" and projector_side(model_layer(n)) == expected_side]
    if len(concatenation) != 1 or not _is_sharer_first(concatenation[0]):
        return "reads the receiver's rows before the sharer's, expected the sharer's first"
    return None


def _wrong_inputs(inputs: set[str], expected: set[str], gate: OpenGate, fuser: FuserCheckpoint) -> str:
    found = ", ".join(sorted(inputs - expected)) or "nothing"
    missing = ", ".join(sorted(expected - inputs)) or "nothing else"
    message = f"is computed from {found} where the checkpoint's layer map names {missing}"
    read = [name.removeprefix(f"sharer_{gate.kind}.") for name in inputs if name.startswith(f"sharer_{gate.kind}.")]
    if len(read) == 1 and read[0].isdecimal() and int(read[0]) != gate.link.sharer_layer:
        by = int(read[0]) - gate.link.sharer_layer
        message += f": its sharer layer is {abs(by)} too {'high' if by > 0 else 'low'}"
    elif any(name.startswith(("sharer_key", "sharer_value")) for name in inputs - expected):
        message += ": keys and values are swapped"
    return message


def _is_sharer_first(concatenation: ir.Node) -> bool:
    first = ancestors(concatenation.inputs[0])[1]
    return any(name.startswith("sharer_") and name != "sharer_rows" for name in first)


def _described(side: ProjectorSide | None) -> str:
    return "an unknown module" if side is None else f"projector {side.projector}'s {side.kind} side"
