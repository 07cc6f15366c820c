"""Folding gates, on a small graph written out by hand: what an open and a closed gate leave behind."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_models import run_graph

from c2c_export.passes.fold_gates import fold_gates

LOGITS = {"open": 1e-6, "wide_open": 3.0, "zero": 0.0, "negative": -2.0}
_SIDE = """
    {name}_wide = Mul (sharer_{name}, {name}_weight)
    {name}_is_open = Greater ({name}_gate_logit, zero)
    {name}_gate = Cast <to = 1> ({name}_is_open)
    {name}_gated = Mul ({name}_gate, {name}_wide)
    {name}_sum = Add (past_{name}, {name}_gated)
    {name} = TensorScatter <axis: int = 1, mode: string = "linear"> (past_{name}, {name}_sum, write_index)
"""


def make_graph(logits: dict[str, float]) -> ir.Model:
    """Each cache [1,3,2] is written over by its rows plus the gated correction `sharer * weight`."""
    caches = [f"float[1,3,2] {prefix}{name}" for name in logits for prefix in ("sharer_", "past_")]
    outputs = [f"float[1,3,2] {name}" for name in logits]
    weights = [f"float {name}_weight = {{2.5}}, float {name}_gate_logit = {{{logits[name]!r}}}" for name in logits]
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 24]>\n'
        f"fuser (int64[1] write_index, {', '.join(caches)}) => ({', '.join(outputs)})\n"
        f"<float zero = {{0.0}}, {', '.join(weights)}>\n"
        "{" + "".join(_SIDE.format(name=name) for name in logits) + "}"
    )
    return ir.from_proto(model)


@pytest.mark.parametrize(("key", "value"), list(itertools.product(LOGITS, LOGITS)))
def test_closed_gates_leave_no_input_output_or_weight_and_open_ones_change_no_number(key: str, value: str) -> None:
    logits = {"key": LOGITS[key], "value": LOGITS[value], "key_of_next": 1.0}
    names = [name for name, logit in logits.items() if logit > 0]
    graph = make_graph(logits)
    random = np.random.default_rng(0)
    caches = {
        spec.name: random.normal(size=(1, 3, 2)).astype(np.float32)
        for spec in graph.graph.inputs
        if spec.name != "write_index"
    }
    inputs = {**caches, "write_index": np.zeros(1, dtype=np.int64)}
    expected = run_graph(ir.to_proto(graph), inputs)

    assert fold_gates(graph) == 3
    folded = ir.to_proto(graph)
    onnx.checker.check_model(folded, full_check=True)
    assert [output.name for output in folded.graph.output] == names
    assert {spec.name for spec in folded.graph.input} == {
        "write_index",
        *(f"{prefix}{name}" for name in names for prefix in ("sharer_", "past_")),
    }
    assert {weight.name for weight in folded.graph.initializer} == {f"{name}_weight" for name in names}
    assert "Greater" not in {node.op_type for node in folded.graph.node}
    found = run_graph(folded, inputs)
    for name in logits:
        if name in names:
            assert (found[name] == expected[name]).all()
            assert (found[name] != caches[f"past_{name}"]).all()
        else:  # what was removed changed nothing
            assert (expected[name] == caches[f"past_{name}"]).all()


def test_a_graph_without_gates_stays_as_it_is() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 24]>\n'
        "agraph (float[2] x, float[2] limit) => (bool[2] y) { y = Greater (x, limit) }"
    )
    graph = ir.from_proto(model)
    assert fold_gates(graph) == 0
    assert [node.op_type for node in graph.graph] == ["Greater"]
