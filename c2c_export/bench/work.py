"""How much work a prompt needs: floating-point operations and bytes, counted from the shapes in the graphs.

Only the products count, which is nearly all: a product of S rows with a weight [K,N] takes 2*S*K*N operations, and
attention takes 4*H*D for every pair of a query and a row that it sees (2 for the score, 2 for the sum of the values).
A window hides rows, which is not subtracted: where prompts are longer than a window, the attention counts too much.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "MatMulNBits"})
_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
_COPYING = frozenset({"Transpose", "Identity"})


@dataclass(frozen=True)
class GraphWork:
    """The products of one portable graph."""

    weight_shapes: tuple[tuple[int, int], ...]
    """[K,N] of every product that each token goes through."""
    chosen_token_shapes: tuple[tuple[int, int], ...]
    """[K,N] of the products that only tokens go through that logits are wanted of: the last MLP, the vocabulary."""
    attention_width: int
    """H*D summed over the attentions, H counting query heads."""

    def flops(self, num_tokens: int, *, first_row: int = 0, num_logits: int = 0) -> int:
        """Operations for `num_tokens` tokens from row `first_row` on, of which `num_logits` need logits.

        2 * tokens * sum(K*N) + 2 * logits * sum(K*N of chosen tokens) + 4 * sum(H*D) * pairs, where token i of the
        prompt sees the `first_row` rows before it, those of the i tokens before it, and its own.
        """
        pairs = num_tokens * first_row + num_tokens * (num_tokens + 1) // 2
        return (
            2 * num_tokens * sum(k * n for k, n in self.weight_shapes)
            + 2 * num_logits * sum(k * n for k, n in self.chosen_token_shapes)
            + 4 * self.attention_width * pairs
        )


def read_graph_work(path: Path) -> GraphWork:
    """Count the products of the portable graph at `path`; its weights are not read."""
    graph = ir.load(path).graph
    layers: list[tuple[int, int]] = []
    chosen: list[tuple[int, int]] = []
    width = 0
    for node in graph:
        if node.op_type in _PRODUCTS:
            shape = _weight_shape(node.inputs[1])
            if shape is not None:
                result = node.outputs[0].shape
                (chosen if result is not None and result[1] == 1 else layers).append(shape)
        elif node.op_type == "Attention":
            query = node.inputs[0]
            assert query is not None
            assert query.shape is not None
            width += int(query.shape[1]) * int(query.shape[3])
    return GraphWork(tuple(layers), tuple(chosen), width)


def product_weight_bytes(path: Path) -> int:
    """Bytes of the weights that every token reads, in the engine's graph at `path`: all but tables that are looked up.

    A table that is also the LM head is read whole. Biases, norms and the scales of integer weights count.
    """
    return sum(num_bytes for num_bytes, readers in _weights(path) if readers - _LOOKUPS)


def lookup_weight_bytes(path: Path) -> int:
    """Bytes of the tables in the engine's graph at `path` that are only looked up, which no token reads whole."""
    return sum(num_bytes for num_bytes, readers in _weights(path) if readers and not readers - _LOOKUPS)


def _weights(path: Path) -> Iterator[tuple[int, set[str]]]:
    """The size of each constant of a graph, and the operators that read it; the values are not read."""
    for value in ir.load(path).graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value.nbytes, {node.op_type for node, _ in value.uses()}


def _weight_shape(value: ir.Value | None) -> tuple[int, int] | None:
    """[K,N] of a product's second factor; None when it is no weight."""
    transposed = False
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in _COPYING:
            return None
        transposed ^= node.op_type == "Transpose"
        value = node.inputs[0]
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    rows, columns = (int(size) for size in value.const_value.shape)
    return (columns, rows) if transposed else (rows, columns)
