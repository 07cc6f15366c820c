"""Compile the trained gates away: `Greater(gate_logit, 0)` is known, so each K or V branch is either plain or gone.

An open gate's multiplication by one disappears. A closed gate's whole branch disappears with its cache output, and with
it the cache input, so a layer with both gates closed leaves no trace. Exact: nothing is approximated.
"""

import onnx_ir as ir

from c2c_export.passes.remove_unused import remove_unused


def fold_gates(model: ir.Model) -> int:
    """Fold every gate of a traced fuser; return how many there were, open and closed together."""
    graph = model.graph
    comparisons = [node for node in graph if node.op_type == "Greater" and _is_gate(node.inputs[0])]
    for comparison in comparisons:
        logit = comparison.inputs[0]
        assert logit is not None
        assert logit.const_value is not None
        multiplication = _only_user(comparison.outputs[0])
        while multiplication.op_type != "Mul":  # a Cast stands between the comparison and the product
            multiplication = _only_user(multiplication.outputs[0])
        if float(logit.const_value.numpy()) > 0.0:
            _remove_factor(multiplication)
        else:
            graph.outputs.remove(_output_fed_by(multiplication.outputs[0]))
    remove_unused(model)
    return len(comparisons)


def _is_gate(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and (value.name or "").endswith("gate_logit")


def _only_user(value: ir.Value) -> ir.Node:
    ((node, _),) = value.uses()
    return node


def _remove_factor(multiplication: ir.Node) -> None:
    """Let the users of `gate * x` use x."""
    _, product = multiplication.inputs
    assert product is not None
    ir.convenience.replace_all_uses_with(multiplication.outputs[0], product)


def _output_fed_by(value: ir.Value) -> ir.Value:
    while not value.is_graph_output():
        value = _only_user(value).outputs[0]
    return value
