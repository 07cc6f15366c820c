"""`x * cos + rotate_half(x) * sin` to the ONNX operator `RotaryEmbedding`, by onnxscript's own rule.

Rotary angles that are scaled afterwards (YaRN's attention factor) do not match the rule and stay as they are.
"""

import onnx_ir as ir
from onnxscript.rewriter.rules.fusion._rotary_embedding import rotary_embedding_rules


def fuse_rotary(model: ir.Model) -> int:
    """Fuse every rotation of queries and keys, two per layer; return how many were fused."""
    return rotary_embedding_rules.apply_to_model(model)
