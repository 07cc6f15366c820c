"""Compute what only the logits need of one token per request: move the choice of the last token up.

A traced decoder chooses the last token behind the final norm, just before the LM head. Everything between the last
layer's attention and there works on each token by itself, so it is computed of the chosen tokens only: the last layer's
output projection and MLP. Exact, and the keys and values of all tokens are as they were.
"""

import onnx_ir as ir

from engines.constant_products import register_constant

# What a token's row becomes depends on that row, on other operands' same row, and on constants.
_ELEMENTWISE = frozenset(
    {"Abs", "Add", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mish"}
    | {"Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh"}
)
_BY_TOKEN = _ELEMENTWISE | {"MatMul", "RMSNormalization"}


def select_last_token(model: ir.Model) -> int:
    """Move the choice above every node whose tokens nothing else reads; return how many nodes that were."""
    graph = model.graph
    choice = next((node for node in graph if node.op_type == "GatherElements"), None)
    if choice is None:
        return 0
    moved = _read_only_by(graph, choice)
    results = {node.outputs[0] for node in moved}
    chosen: dict[ir.Value, ir.Value] = {}
    for node in moved:
        for position, value in enumerate(node.inputs):
            if value is None or value in results or not _has_tokens(value):
                continue
            if value not in chosen:
                chosen[value] = _choose(graph, value, before=node)
            node.replace_input_with(position, chosen[value])
        output = node.outputs[0]
        output.shape = _of_one_token(output)
    hidden = choice.inputs[0]
    assert hidden is not None
    if hidden in results:
        ir.convenience.replace_all_uses_with(choice.outputs[0], hidden)
        graph.remove(choice, safe=True)
    return len(moved)


def _read_only_by(graph: ir.Graph, choice: ir.Node) -> list[ir.Node]:
    """The nodes, in the graph's order, that work by token and that only `choice` reads, or only others of them."""
    found = {choice}
    in_order = []
    for node in reversed(graph):
        if node in found or node.op_type not in _BY_TOKEN or node.outputs[0].is_graph_output():
            continue
        readers = {use.node for use in node.outputs[0].uses()}
        if readers and readers <= found and _has_tokens(node.outputs[0]):
            found.add(node)
            in_order.append(node)
    return in_order[::-1]


def _has_tokens(value: ir.Value) -> bool:
    """Whether it is [B,S,…]: the traced graph calls its second dimension by one name everywhere."""
    return value.shape is not None and len(value.shape) == 3 and not isinstance(value.shape[1], int)


def _of_one_token(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([value.shape[0], 1, value.shape[2]])


def _choose(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """`value` [B,S,W] of the tokens that the graph's input `last_token` [B] names: [B,1,W]."""
    last_token = next(graph_input for graph_input in graph.inputs if graph_input.name == "last_token")
    assert value.shape is not None
    name = f"{value.name}.last_token"
    axes = register_constant(graph, ir.tensor([1, 2], dtype=ir.DataType.INT64, name=f"{name}.axes"))
    one_row = [1, 1, int(value.shape[2])]
    shape = register_constant(graph, ir.tensor(one_row, dtype=ir.DataType.INT64, name=f"{name}.shape"))
    unsqueezed = ir.node("Unsqueeze", [last_token, axes])
    index = ir.node("Expand", [unsqueezed.outputs[0], shape])
    gathered = ir.node("GatherElements", [value, index.outputs[0]], {"axis": 1})
    for node, suffix, dtype in (
        (unsqueezed, "unsqueezed", ir.DataType.INT64),
        (index, "index", ir.DataType.INT64),
        (gathered, "chosen", value.dtype),
    ):
        output = node.outputs[0]
        output.name, output.dtype = f"{name}.{suffix}", dtype
        output.shape = _of_one_token(value)
        node.metadata_props.update(before.metadata_props)
        graph.insert_before(before, node)
    unsqueezed.outputs[0].shape = ir.Shape([value.shape[0], 1, 1])
    return gathered.outputs[0]
