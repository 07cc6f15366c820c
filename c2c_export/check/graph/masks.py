"""The masks of a decoder's graph: what they are made of, and which layers have a window.

In: the graph and the trained model. Out: a `Divergence` for each comparison, window or row number that is another:

    full     row <= own row  and  row < kv_length
    sliding  full  and  position - row's position < window

where the rows are numbered from 0, and the own row is write_index plus the token's number. Lowered for ONNX Runtime,
a mask is turned into scores to be added, 0 where it is true and very negative elsewhere.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from c2c_export.check.graph.modules import decoder_layer, submodule
from c2c_export.check.graph.paths import ancestors, operand
from c2c_export.check.graph.stored import is_constant, read_constant, read_constant_integers
from c2c_export.check_record import Divergence
from engines.model_layers import model_layer

_MASK_OPERAND = {"Attention": 3, "GroupQueryAttention": 10}
_COMPARISONS = ("LessOrEqual", "Less", "And", "Sub", "Or", "Not", "Greater", "GreaterOrEqual", "Equal", "Xor")
_FULL = Counter({"LessOrEqual": 1, "Less": 1, "And": 1})
_SLIDING = Counter({"LessOrEqual": 1, "Less": 2, "And": 2, "Sub": 1})
_NEGLIGIBLE = -1e9
"""A masked score must be no higher: its exponential is then 0 beside any other's."""


def window_of(trained: PreTrainedModel, layer: int) -> int | None:
    """The window of a layer, in positions; None where it attends to everything."""
    if trained.config.model_type == "mistral":  # whose layers do not keep it
        return trained.config.sliding_window
    return getattr(submodule(trained, f"model.layers.{layer}.self_attn"), "sliding_window", None)


def check_masks(name: str, graph: ir.Model, trained: PreTrainedModel) -> Iterator[Divergence]:
    """What of the masks of the graph `name` is not as in the module's docstring; each mask once."""
    seen: set[tuple[ir.Value, int | None]] = set()
    for node in graph.graph:
        if node.op_type not in _MASK_OPERAND:
            continue
        layer = decoder_layer(model_layer(node))
        mask = operand(node, _MASK_OPERAND[node.op_type])
        window = None if layer is None else window_of(trained, layer)
        if mask is not None and (mask, window) in seen:
            continue
        problem = "its attention has no mask" if mask is None else _mask_problem(mask, window)
        if problem:
            yield Divergence(graph=name, layer=layer, message=f"the mask of layer {layer}: {problem}")
        if mask is not None:
            seen.add((mask, window))


def explained_by_masks(node: ir.Node) -> bool:
    """Whether `node` turns a mask into scores, whose two constants `check_masks` compares."""
    return node.op_type == "Where"


def _mask_problem(mask: ir.Value, window: int | None) -> str | None:
    producer = mask.producer()
    if producer is not None and producer.op_type == "Where":
        problem = _scores_problem(producer)
        if problem:
            return problem
        mask = producer.inputs[0]
    nodes, inputs = ancestors(mask)
    # Sizes come from other inputs, which comparisons do not read.
    nodes = [node for node in nodes if node.op_type in _COMPARISONS]
    found = Counter(node.op_type for node in nodes)
    if window is None and "row_position_ids" in inputs:
        return "it has a window, expected none"
    if window is not None and "row_position_ids" not in inputs:
        return f"it has no window, expected one of {window} positions"
    expected = _FULL if window is None else _SLIDING
    if found != expected:
        return f"it is made of {_listed(found)}, expected {_listed(expected)}"
    return next(filter(None, (_comparison_problem(node, window) for node in nodes)), None)


def _scores_problem(node: ir.Node) -> str | None:
    if not all(map(is_constant, node.inputs[1:3])):
        return "its scores are not constant"
    seen, hidden = (read_constant(value) for value in node.inputs[1:3])
    assert seen is not None
    assert hidden is not None
    if np.any(seen.numbers != 0) or not np.all(hidden.numbers <= _NEGLIGIBLE):
        return f"it adds {seen.numbers} to scores that are seen and {hidden.numbers} to others, expected 0 and -1e30"
    return None


def _comparison_problem(node: ir.Node, window: int | None) -> str | None:
    """What is wrong with one comparison; which input it reads tells which one it is."""
    if node.op_type not in ("LessOrEqual", "Less"):
        return None
    left, right = node.inputs[:2]
    if "row_position_ids" in ancestors(left)[1]:
        return _window_problem(left, right, window)
    problem = _rows_problem(left)
    if problem:
        return problem
    read = ancestors(right)[1] & {"write_index", "kv_length", "position_ids", "row_position_ids"}
    expected = "write_index" if node.op_type == "LessOrEqual" else "kv_length"
    if read != {expected}:
        sign = "<=" if node.op_type == "LessOrEqual" else "<"
        return f"it compares rows by {sign} with {', '.join(sorted(read)) or 'a constant'}, expected {expected}"
    return None


def _window_problem(left: ir.Value, right: ir.Value, window: int | None) -> str | None:
    found = read_constant_integers(right)
    if found is None or found.size != 1 or int(found.reshape(-1)[0]) != window:
        shown = "not constant" if found is None else found.reshape(-1)[:4].tolist()
        return f"its window is {shown}, expected {window}"
    difference = left.producer()
    if difference is None or difference.op_type != "Sub":
        return "its window compares no difference of positions"
    minuend, subtrahend = (ancestors(value)[1] for value in difference.inputs)
    if "position_ids" not in minuend or "row_position_ids" not in subtrahend:
        return "its window subtracts the new tokens' positions from the rows', expected the other way round"
    return None


def _rows_problem(rows: ir.Value) -> str | None:
    """Whether `rows` is 0, 1, 2, …, or the first ones of them."""
    producer = rows.producer()
    if producer is not None and producer.op_type == "Slice":
        start = read_constant_integers(producer.inputs[1])
        if start is None or np.any(start != 0):
            return "it does not begin with row 0"
        rows = producer.inputs[0]
    numbers = read_constant_integers(rows)
    if numbers is None:
        return "the rows that it compares are not numbered by a constant"
    expected = np.arange(numbers.size)
    wrong = np.flatnonzero(numbers.reshape(-1) != expected)
    if len(wrong):
        return f"row {wrong[0]} is numbered {numbers.reshape(-1)[wrong[0]]}, expected {wrong[0]}"
    return None


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no comparison"
