"""Where a value of a graph comes from: backwards through what only moves or normalises it, or to all graph inputs."""

from dataclasses import dataclass

import onnx_ir as ir

from c2c_export.check.graph.stored import is_constant

PRODUCTS = ("MatMul", "FusedMatMul", "MatMulNBits")
_FOLLOWED = ("Transpose", "Reshape", "Cast", "Identity", "RotaryEmbedding", "RMSNormalization", "GatherElements")


@dataclass(frozen=True, eq=False)
class Path:
    """From a value back to the first node that computes something else, past the nodes in between, latest first."""

    source: ir.Node | None
    """None where the path ends in a graph input or a constant."""
    passed: tuple[ir.Node, ...]

    def nodes(self, op_type: str) -> list[ir.Node]:
        """Those passed nodes that are of one operator."""
        return [node for node in self.passed if node.op_type == op_type]


def follow_back(value: ir.Value | None) -> Path:
    """The path of `value` past moves, casts, biases, norms, rotations, choices of a token, and sums put behind it."""
    passed: list[ir.Node] = []
    node = None if value is None else value.producer()
    while node is not None:
        following = _followed_input(node)
        if following is None:
            break
        passed.append(node)
        node = following.producer()
    return Path(node, tuple(passed))


def ancestors(value: ir.Value | None) -> tuple[list[ir.Node], set[str]]:
    """All nodes that `value` depends on, and the names of all graph inputs."""
    nodes: dict[ir.Node, None] = {}
    inputs: set[str] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current is None:
            continue
        node = current.producer()
        if node is None:
            if current.is_graph_input():
                inputs.add(str(current.name))
        elif node not in nodes:
            nodes[node] = None
            pending.extend(node.inputs)
    return list(nodes), inputs


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; None where it has none there."""
    return node.inputs[index] if index < len(node.inputs) else None


def name_of(value: ir.Value | None) -> str:
    """A value's name; "nothing" for an input that is left out."""
    return "nothing" if value is None else str(value.name)


def _followed_input(node: ir.Node) -> ir.Value | None:
    if node.op_type in _FOLLOWED:
        return node.inputs[0]
    if node.op_type == "Add" and any(map(is_constant, node.inputs)):
        return next((value for value in node.inputs if not is_constant(value)), None)
    if node.op_type == "Concat" and len(node.inputs) == 2:
        summed = node.inputs[1].producer()
        return node.inputs[0] if summed is not None and summed.op_type == "ReduceSum" else None
    return None
