"""Compute what only the logits need of one token per request: move the choice of the last token up.

A traced decoder chooses the last token behind the final norm, just before the LM head. Everything between the last
layer's attention and there works on each token by itself, so it is computed of the chosen tokens only: the last layer's
output projection and MLP. Exact, and the keys and values of all tokens are as they were. An operator that might mix
tokens (a norm over more than the channels, a factor or summand that is not the same for all of them) stays where it
is, and so does what lies above it.
"""

import onnx_ir as ir

from engines.constant_products import register_constant

# What a token's row becomes depends on that row, on other operands' same row, and on constants.
_ELEMENTWISE = frozenset(
    {"Abs", "Add", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mish"}
    | {"Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh"}
)


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
            if value is None or value in results or not _has_tokens(value, choice):
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
        if node in found or node.outputs[0].is_graph_output() or not _works_by_token(node, choice):
            continue
        readers = {use.node for use in node.outputs[0].uses()}
        if readers and readers <= found:
            found.add(node)
            in_order.append(node)
    return in_order[::-1]


def _works_by_token(node: ir.Node, choice: ir.Node) -> bool:
    """Whether each token's row of the result depends on the same row of the operands that have tokens, and on them."""
    if not node.inputs or not _has_tokens(node.outputs[0], choice):
        return False
    first, *others = node.inputs
    if node.op_type == "MatMul":
        return _has_tokens(first, choice) and _is_constant(others[0]) and _rank(others[0]) == 2
    if node.op_type == "RMSNormalization":
        channels = node.attributes.get_int("axis", -1) in (-1, 2)
        return channels and _has_tokens(first, choice) and all(_is_same_for_all(other) for other in others)
    return node.op_type in _ELEMENTWISE and all(
        value is None or _has_tokens(value, choice) or _is_same_for_all(value) for value in node.inputs
    )


def _has_tokens(value: ir.Value | None, choice: ir.Node) -> bool:
    """Whether it is [B,S,W] with the batch and the tokens of what `choice` chooses from."""
    hidden = choice.inputs[0]
    assert hidden is not None
    if value is None or value.shape is None or hidden.shape is None or len(value.shape) != 3:
        return False
    batch, tokens, width = value.shape
    named = not isinstance(tokens, int) and tokens.value is not None
    return named and isinstance(width, int) and (batch, tokens) == (hidden.shape[0], hidden.shape[1])


def _is_same_for_all(value: ir.Value | None) -> bool:
    """Whether it is left out, or a constant that has one row at most."""
    if value is None:
        return True
    return _is_constant(value) and value.shape is not None and (len(value.shape) < 2 or value.shape[-2] == 1)


def _is_constant(value: ir.Value | None) -> bool:
    """Whether it is an initializer, or computed of initializers alone."""
    if value is None:
        return False
    producer = value.producer()
    return value.is_initializer() if producer is None else all(_is_constant(part) for part in producer.inputs)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


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
