"""`x * cos + rotate_half(x) * sin` to the ONNX operator `RotaryEmbedding`, by onnxscript's own rule.

Where cosines and sines are scaled (YaRN's attention factor, arXiv 2309.00071), a rule of ours takes the scale along.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules.fusion._rotary_embedding import RotaryEmbedding23Fusion, rotary_embedding_rules


class FuseScaledRotary(RotaryEmbedding23Fusion):
    """onnxscript's rule for angles whose cosine and sine are multiplied by one number."""

    def pattern(
        self,
        op: Any,
        x: Any,
        freqs: Any,
        scale: Any,
        start1: Any,
        end1: Any,
        start2: Any,
        end2: Any,
        one1: Any,
        one2: Any,
    ) -> Any:
        """What the rule looks for."""
        angles = op.Concat(freqs, freqs, axis=-1)
        cosines = op.Unsqueeze(op.Cos(angles) * scale, one1)
        sines = op.Unsqueeze(op.Sin(angles) * scale, one2)
        first = op.Slice(x, start1, end1, [3], [1])
        second = op.Slice(x, start2, end2, [3], [1])
        return x * cosines + op.Concat(op.Neg(second), first, axis=-1) * sines

    def check(self, op: Any, x: Any, scale: ir.Value, **values: Any) -> Any:
        """Whether a match is one: besides what onnxscript's rule asks for, the scale is one constant."""
        result = super().check(op, x, **values)
        if scale.const_value is None or scale.const_value.size != 1:
            return result.fail("the scale of the cosines is not one constant", scale)
        return result

    def rewrite(self, op: Any, x: ir.Value, freqs: ir.Value, scale: ir.Value, **_: Any) -> Any:
        """What takes its place."""
        assert x.shape is not None
        cosines, sines = op.Mul(op.Cos(freqs), scale), op.Mul(op.Sin(freqs), scale)
        return op.RotaryEmbedding(x, cosines, sines, interleaved=0, num_heads=x.shape[1])


_SCALED = RewriteRuleSet([FuseScaledRotary.rule()])


def fuse_rotary(model: ir.Model) -> int:
    """Fuse every rotation of queries and keys, two per layer; return how many were fused."""
    return rotary_embedding_rules.apply_to_model(model) + _SCALED.apply_to_model(model)
