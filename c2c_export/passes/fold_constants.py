"""Compute what depends on constants alone, as the tracer's own optimizer would; the norm rule matches only then."""

import onnx_ir as ir
from onnxscript import optimizer

from c2c_export.passes.remove_unused import remove_unused


def fold_constants(model: ir.Model) -> int:
    """Fold constant expressions in place; return how many nodes went. Exact."""
    before = len(model.graph)
    optimizer.fold_constants(model)
    remove_unused(model)
    return before - len(model.graph)
