"""The rewrite rule from cache updates and attention to ONNX Runtime's `GroupQueryAttention`, over the same buffers.

In: `TensorScatter` of new keys and of new values, and `Attention` over both caches with an explicit boolean mask
[B,1,S,C]. Out: one `com.microsoft.GroupQueryAttention`, which writes the new rows into the caches that are bound as its
past and its present, and attends to the T rows in use instead of all C. What the mask says beyond causality (a closing
padding row that sees the others only, sliding windows by position) it gets as an additive `attention_bias` [B,1,S,T].
Rotation and q/k norms stay outside: inside the operator, a prompt's positions have no gaps, and a window counts rows.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from c2c_export.errors import C2CError
from engines.constant_products import register_constant
from engines.ort.layout_rules import HEADS_FIRST, merge_heads, split_heads

DOMAIN = "com.microsoft"
_PAST = "past_"
_HIDDEN = -1e30
"""Added to a score that is masked. Not minus infinity, of which a row that sees nothing would become NaN."""


_LAYOUT_OPERATORS = frozenset({"Expand", "Reshape", "Slice", "Squeeze", "Unsqueeze"})


class RowsInUse:
    """Values that every attention of a decoder shares, computed once at the beginning of its graph.

    The graph's masks are made for T rows, the most that a request of the batch has, instead of all C.
    """

    def __init__(self, graph: ir.Graph) -> None:
        """Add the nodes, and shorten the masks. Raises `C2CError` when the graph's masks are not of the known form."""
        self._graph = graph
        self._first = graph[0]
        self._biases: dict[ir.Value, ir.Value] = {}
        inputs = {value.name: value for value in graph.inputs}
        new_rows = self._node("Shape", [inputs["input_ids"]], start=1, end=2)
        lengths = self._node("Add", [inputs["write_index"], new_rows])
        one = self._constant(np.array(1, dtype=np.int64))
        last_rows = self._node("Sub", [lengths, one])
        self.last_rows = self._node("Cast", [last_rows], to=ir.DataType.INT32.value)
        """int32 [B]: the last row that each request has, this call's included."""
        most = self._node("ReduceMax", [lengths], keepdims=0)
        self.most = self._node("Cast", [most], to=ir.DataType.INT32.value)
        """int32: T."""
        self._shorten_masks(most)

    def bias(self, mask: ir.Value) -> ir.Value:
        """The additive form, float32 [B,1,S,T], of a boolean mask; the same value for the same mask."""
        if mask not in self._biases:
            seen = self._constant(np.array(0, dtype=np.float32))
            hidden = self._constant(np.array(_HIDDEN, dtype=np.float32))
            node = ir.node("Where", [mask, seen, hidden], name=f"{mask.name}.bias")
            producer = mask.producer()
            assert producer is not None
            self._graph.insert_after(producer, node)
            node.outputs[0].name, node.outputs[0].dtype = f"{mask.name}.bias", ir.DataType.FLOAT
            self._biases[mask] = node.outputs[0]
        return self._biases[mask]

    def _shorten_masks(self, most: ir.Value) -> None:
        """Let every mask be made of the first T entries of what has one for each row of the caches."""
        computed, by_row = _made_of(self._graph)
        if not by_row:
            raise C2CError("the graph's masks do not number the caches' rows in the known way; export the bundle again")
        start, stop = self._ints(0), self._node("Reshape", [most, self._ints(1)])
        for value in by_row:
            short = self._node("Slice", [value, start, stop, self._ints(-1)])
            # What else reads the value wants all rows.
            for use in list(value.uses()):
                if use.node in computed:
                    use.node.replace_input_with(use.idx, short)
            short.dtype = value.dtype

    def _node(self, operator: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(operator, inputs, attributes)
        self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def _ints(self, value: int) -> ir.Value:
        return self._constant(np.array([value], dtype=np.int64))

    def _constant(self, array: NDArray[np.generic]) -> ir.Value:
        name = f"rows_in_use.{array.dtype}.{'x'.join(map(str, array.shape))}.{array.reshape(-1)[0]}"
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        return register_constant(self._graph, ir.tensor(array, name=name))


class FuseAttention(RewriteRuleClassBase):
    """`Attention` over two caches that `TensorScatter` has just written, to `GroupQueryAttention`."""

    def __init__(self, rows: RowsInUse) -> None:
        super().__init__("FuseAttention")
        self._rows = rows

    def pattern(
        self, op: Any, query: Any, key: Any, value: Any, past_key: Any, past_value: Any, write_index: Any, mask: Any
    ) -> Any:
        """What the rule looks for."""
        keys = op.TensorScatter(past_key, key, write_index, axis=2, mode="linear", _outputs=["keys"])
        values = op.TensorScatter(past_value, value, write_index, axis=2, mode="linear", _outputs=["values"])
        attended = op.Attention(query, keys, values, mask, _allow_other_attributes=True, _outputs=["attended"])
        return attended, keys, values

    def check(
        self,
        context: Any,
        attended: ir.Value,
        keys: ir.Value,
        values: ir.Value,
        past_key: ir.Value,
        past_value: ir.Value,
        write_index: ir.Value,
        **_: ir.Value,
    ) -> MatchResult:
        """Whether a match is one: the attention is scaled and masked, and nothing else, and the caches are the graph's.

        The operator is told neither where to write, which follows from `RowsInUse`, nor which buffers: an output is
        bound to the memory of the input of its name.
        """
        result, node = MatchResult(), attended.producer()
        assert node is not None
        others = {name for name, attribute in node.attributes.items() if name != "scale" and attribute.value}
        if others:
            return result.fail(f"attention with {', '.join(sorted(others))}")
        if not write_index.is_graph_input() or write_index.name != "write_index":
            return result.fail(f"rows are written at {write_index.name}, expected the graph's input write_index")
        for written, past in ((keys, past_key), (values, past_value)):
            is_same = past.name == f"{_PAST}{written.name}"
            if not (is_same and past.is_graph_input() and written.is_graph_output()):
                return result.fail(f"{past.name} with its new rows is {written.name}, expected an output of its name")
        return result

    def rewrite(
        self,
        op: Any,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        past_key: ir.Value,
        past_value: ir.Value,
        mask: ir.Value,
        attended: ir.Value,
        **_: ir.Value,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """What takes its place."""
        assert attended.shape is not None
        assert past_key.shape is not None
        num_heads, head_size = int(attended.shape[1]), int(attended.shape[3])
        num_key_value_heads = int(past_key.shape[1])
        node = attended.producer()
        assert node is not None

        def tokens_first(x: ir.Value, heads: int) -> ir.Value:
            transposed = op.Transpose(x, perm=HEADS_FIRST)
            if x.shape is not None:
                transposed.shape, transposed.dtype = ir.Shape([x.shape[i] for i in HEADS_FIRST]), ir.DataType.FLOAT
            return merge_heads(op, transposed, heads * head_size)

        result, keys, values = op.GroupQueryAttention(
            tokens_first(query, num_heads),
            tokens_first(key, num_key_value_heads),
            tokens_first(value, num_key_value_heads),
            past_key,
            past_value,
            self._rows.last_rows,
            self._rows.most,
            None,
            None,
            None,
            self._rows.bias(mask),
            num_heads=num_heads,
            kv_num_heads=num_key_value_heads,
            scale=node.attributes.get_float("scale", head_size**-0.5),
            _domain=DOMAIN,
            _outputs=3,
        )
        for new, past in ((keys, past_key), (values, past_value)):
            new.shape, new.dtype = past.shape, past.dtype
        result.dtype = attended.dtype
        result.shape = ir.Shape([attended.shape[0], attended.shape[2], num_heads * head_size])
        return op.Transpose(split_heads(op, result, num_heads, head_size), perm=HEADS_FIRST), keys, values


def _made_of(graph: ir.Graph) -> tuple[set[ir.Node], list[ir.Value]]:
    """The nodes that compute the masks of all attentions, and what those begin with that has C entries, [...,C].

    Raises `C2CError` where that is neither the numbers of the rows nor the input `row_position_ids`.
    """
    attentions = [node for node in graph if node.op_type == "Attention"]
    capacities = {
        cache.shape[2] for node in attentions if (cache := node.inputs[1]) is not None and cache.shape is not None
    }
    if len(capacities) != 1 or not isinstance(capacity := capacities.pop(), int):
        raise C2CError("the graph's caches have no capacity in common; export the bundle again")
    computed: set[ir.Node] = set()
    by_row: dict[ir.Value, None] = {}
    pending = [node.inputs[3] for node in attentions]
    while pending:
        value = pending.pop()
        producer = None if value is None else value.producer()
        if producer is not None:
            if producer not in computed:
                computed.add(producer)
                # What follows says which shape the result has, or where it lies.
                pending.extend(producer.inputs[:1] if producer.op_type in _LAYOUT_OPERATORS else producer.inputs)
        elif value is not None and value.shape is not None and len(value.shape) and value.shape[-1] == capacity:
            if not _numbers_rows(value, capacity):
                raise C2CError(
                    f"a mask reads {value.name}, expected the rows' numbers or row_position_ids; export the bundle "
                    "again"
                )
            by_row[value] = None
    return computed, list(by_row)


def _numbers_rows(value: ir.Value, capacity: int) -> bool:
    """Whether `value`, of `capacity` entries for each request, is 0 to C-1 or the positions of all rows."""
    if value.const_value is None:
        return value.is_graph_input() and value.name == "row_position_ids"
    return np.array_equal(value.const_value.numpy().reshape(-1), np.arange(capacity))
