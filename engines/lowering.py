"""From a portable graph to the graph that an engine is built from: quantised, retyped, saved.

In: a portable graph's file and a precision. Out: a `LoweredGraph`, and its file with the weights beside it. What each
step does is in `engines.quantize` and `engines.precision`.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from engines.precision import lower_precision
from engines.quantize import float_weights, quantize_weights


@dataclass(frozen=True)
class LoweredGraph:
    """A graph in the precision that an engine is built from, and what lowering did to it."""

    model: ir.Model
    quantized_weights: int
    """Matrices that became integers; 0 but for int8 and int4."""
    float_weights: int
    """Of those precisions: matrices that stay in float16, as their shape does not allow integers."""
    casts: int


def lower(path: Path, precision: str, *, is_fuser: bool) -> LoweredGraph:
    """The portable graph at `path` in "fp16" or "bf16", or with "int8" or "int4" weights and the rest in fp16.

    Raises `C2CError` naming a weight that does not fit into the precision.
    """
    model = ir.load(path)
    quantized = kept = 0
    if precision in ("int8", "int4"):
        quantized = quantize_weights(model, "int8" if precision == "int8" else "int4")
        kept = len(float_weights(model))
        precision = "fp16"
    return LoweredGraph(model, quantized, kept, lower_precision(model, precision, is_fuser=is_fuser))


def save_lowered(lowered: LoweredGraph, path: Path) -> None:
    """Write the graph to `path` and its weights to `weights_of(path)`, whatever their size."""
    ir.save(lowered.model, path, external_data=weights_of(path).name)


def weights_of(onnx_path: Path) -> Path:
    """The file beside `onnx_path` that holds its weights."""
    return onnx_path.with_name(f"{onnx_path.name}.data")
