"""From a portable graph to the graph that an engine is built from: rewritten, quantised, retyped, saved.

In: a portable graph's file, a target and a precision. Out: a `LoweredGraph`, and its file with the weights beside it.
What each step does is in `engines.quantize` and `engines.precision` for GPUs, in `engines.ort` for the CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from engines.precision import lower_precision
from engines.quantize import WeightPrecision, float_weights, quantize_weights

_INTEGER_WEIGHTS: Mapping[str, WeightPrecision] = {"int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class LoweredGraph:
    """A graph in the precision that an engine is built from, and what lowering did to it."""

    model: ir.Model
    quantized_weights: int
    """Matrices that became integers; 0 but for int8 and int4."""
    float_weights: int
    """Of those precisions: matrices that stay in float16, as their shape does not allow integers."""
    casts: int
    rules: Mapping[str, int] = field(default_factory=dict)
    """How often each rewrite rule applied, by name."""


def lower(path: Path, target: str, precision: str, *, is_fuser: bool) -> LoweredGraph:
    """The portable graph at `path`, lowered for `target`.

    For the CPU with ONNX Runtime's own operators, in "fp32", or with "int8" or "int4" weights and the rest in fp32.
    For GPUs in "fp16" or "bf16", or with "int8" or "int4" weights and the rest in fp16.

    Raises `C2CError` naming a weight that does not fit into the precision, or a layer that no rule covers.
    """
    model = ir.load(path)
    if target == "ort-cpu":
        return _lower_for_cpu(model, precision, is_fuser=is_fuser)
    quantized = kept = 0
    if precision in _INTEGER_WEIGHTS:
        quantized = quantize_weights(model, _INTEGER_WEIGHTS[precision])
        kept = len(float_weights(model))
        precision = "fp16"
    return LoweredGraph(model, quantized, kept, lower_precision(model, precision, is_fuser=is_fuser))


def _lower_for_cpu(model: ir.Model, precision: str, *, is_fuser: bool) -> LoweredGraph:
    # Only this target needs onnxscript.
    from engines.ort.lower import check_fuser, lower_decoder
    from engines.ort.quantize import quantize_for_cpu

    # A fuser has neither attention nor heads to rotate.
    if is_fuser:
        check_fuser(model)
    rules = {} if is_fuser else lower_decoder(model)
    if precision == "fp32":
        return LoweredGraph(model, quantized_weights=0, float_weights=0, casts=0, rules=rules)
    counts = quantize_for_cpu(model, precision)
    rules |= {"add_offsets": counts.with_offsets, "quantize_embeddings": counts.embeddings}
    return LoweredGraph(model, counts.matrices, counts.kept_in_float, casts=0, rules=rules)


def save_lowered(lowered: LoweredGraph, path: Path, *, own_weights: bool = True) -> None:
    """Write the graph to `path` and its weights to `weights_of(path)`, whatever their size.

    Without `own_weights`, the graph refers by name and offset to the file of the portable graph's weights, which is not
    copied.
    """
    ir.save(lowered.model, path, external_data=weights_of(path).name if own_weights else None)


def weights_of(onnx_path: Path) -> Path:
    """The file beside `onnx_path` that holds its weights."""
    return onnx_path.with_name(f"{onnx_path.name}.data")
