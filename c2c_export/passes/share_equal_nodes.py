"""Compute once what several nodes compute alike: the rotary angles of all layers, rows that many projectors read."""

import onnx_ir as ir
from onnx_ir.passes import common


def share_equal_nodes(model: ir.Model) -> int:
    """Merge nodes with the same operator, attributes and inputs; return how many went. Exact."""
    before = len(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    return before - len(model.graph)
