"""Rewrite rules that keep a decoder's queries, keys and values token by token, [B,S,H*D], as ONNX Runtime wants them.

A portable graph turns them heads first, [B,H,S,D], before it normalises and rotates them. Both work on each head of
each token by itself, so the transposition can come after them; there it meets the one that `GroupQueryAttention` needs
(`engines.ort.attention_rule`), and both are gone. None of these rules changes a number.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase
from onnxscript.rewriter.rules.common import no_op_transpose_rule, transpose_transpose_rule

HEADS_FIRST = (0, 2, 1, 3)
"""The permutation from [B,S,H,D] to [B,H,S,D], and back."""


class NormBeforeTranspose(RewriteRuleClassBase):
    """`RMSNormalization(Transpose(x))` over a head's channels alone to `Transpose(RMSNormalization(x))`."""

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        """What the rule looks for."""
        return op.RMSNormalization(
            op.Transpose(x, perm=HEADS_FIRST), weight, _allow_other_attributes=True, _outputs=["normed"]
        )

    def check(self, context: Any, normed: ir.Value, **_: ir.Value) -> MatchResult:
        """Whether a match is one."""
        result, node = MatchResult(), normed.producer()
        assert node is not None
        # Over more than the last axis the heads' place would matter.
        if node.attributes.get_int("axis", -1) not in (-1, len(HEADS_FIRST) - 1):
            return result.fail("the norm is not that of each head alone")
        return result

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, normed: ir.Value) -> ir.Value:
        """What takes its place."""
        node = normed.producer()
        assert node is not None
        return op.Transpose(op.RMSNormalization(x, weight, **_attributes(node)), perm=HEADS_FIRST)


class RotaryBeforeTranspose(RewriteRuleClassBase):
    """`RotaryEmbedding(Transpose(x))` to the form of the operator that takes tokens first, [B,S,H*D]."""

    def pattern(self, op: Any, x: Any, cosines: Any, sines: Any) -> Any:
        """What the rule looks for."""
        return op.RotaryEmbedding(
            op.Transpose(x, perm=HEADS_FIRST), cosines, sines, _allow_other_attributes=True, _outputs=["rotated"]
        )

    def rewrite(self, op: Any, x: ir.Value, cosines: ir.Value, sines: ir.Value, rotated: ir.Value) -> ir.Value:
        """What takes its place."""
        node = rotated.producer()
        assert node is not None
        assert rotated.shape is not None
        num_heads, head_size = int(rotated.shape[1]), int(rotated.shape[3])
        tokens_first = op.RotaryEmbedding(
            merge_heads(op, x, num_heads * head_size), cosines, sines, **{**_attributes(node), "num_heads": num_heads}
        )
        return op.Transpose(split_heads(op, tokens_first, num_heads, head_size), perm=HEADS_FIRST)


class RemoveReshapes(RewriteRuleClassBase):
    """Two `Reshape`s of which the second gives the shape that the first was given."""

    def pattern(self, op: Any, x: Any, between: Any, shape: Any) -> Any:
        """What the rule looks for."""
        inner = op.Reshape(x, between, _allow_other_attributes=True)
        return op.Reshape(inner, shape, _allow_other_attributes=True, _outputs=["reshaped"])

    def check(self, context: Any, x: ir.Value, reshaped: ir.Value, **_: ir.Value) -> MatchResult:
        """Whether a match is one."""
        result = MatchResult()
        if x.shape is None or reshaped.shape is None or x.shape != reshaped.shape or not _is_known(x.shape):
            return result.fail("the shapes differ, or are not known")
        return result

    def rewrite(self, op: Any, x: ir.Value, **_: ir.Value) -> ir.Value:
        """What takes its place."""
        return op.Identity(x)


NORM_RULE: RewriteRule = NormBeforeTranspose.rule()
ROTARY_RULE: RewriteRule = RotaryBeforeTranspose.rule()
RESHAPE_RULE: RewriteRule = RemoveReshapes.rule()
TRANSPOSE_RULES: tuple[RewriteRule, ...] = (transpose_transpose_rule, no_op_transpose_rule)


def merge_heads(op: Any, x: ir.Value, width: int) -> ir.Value:
    """`x` [B,S,H,D] as [B,S,width]."""
    merged = op.Reshape(x, op.Constant(value_ints=[0, 0, width]))
    return _shaped(merged, x, [width])


def split_heads(op: Any, x: ir.Value, num_heads: int, head_size: int) -> ir.Value:
    """`x` [B,S,H*D] as [B,S,H,D]."""
    split = op.Reshape(x, op.Constant(value_ints=[0, 0, num_heads, head_size]))
    return _shaped(split, x, [num_heads, head_size])


def _shaped(value: ir.Value, like: ir.Value, trailing: list[int]) -> ir.Value:
    if like.shape is not None:
        value.shape = ir.Shape([*like.shape.dims[:2], *trailing])
    value.dtype = ir.DataType.FLOAT
    return value


def _is_known(shape: ir.Shape) -> bool:
    """Whether every dimension has a number or a name; two without either are not the same."""
    return all(isinstance(dim, int) or dim.value is not None for dim in shape)


def _attributes(node: ir.Node) -> dict[str, ir.Attr]:
    return dict(node.attributes)
