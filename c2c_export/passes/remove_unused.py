"""Remove the nodes, weights and inputs that no output depends on any more."""

import onnx_ir as ir
from onnx_ir.passes import common


def remove_unused(model: ir.Model) -> int:
    """Remove dead nodes, initializers and graph inputs in place; return how many nodes and inputs went."""
    graph = model.graph
    before = len(graph) + len(graph.inputs)
    common.RemoveUnusedNodesPass()(model)
    kept = set(graph.outputs)
    for value in [v for v in graph.inputs if not v.uses() and v not in kept]:
        graph.inputs.remove(value)
    return before - len(graph) - len(graph.inputs)
