"""`x * rsqrt(mean(x^2) + eps) * scale` to the ONNX operator `RMSNormalization`, by onnxscript's own rule."""

import onnx_ir as ir
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_ruleset


def fuse_rms_norms(model: ir.Model) -> int:
    """Fuse every RMS norm; return how many there were. Numbers stay equal up to the order of float32 sums."""
    return rms_normalization_ruleset.apply_to_model(model)
