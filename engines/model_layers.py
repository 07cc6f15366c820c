"""Names of a model's own layers for the nodes of its graph, for messages that a user can act on."""

import ast

import onnx_ir as ir

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
NO_LAYER = "mask and positions"
"""What `model_layer` says of a node that belongs to none of the model's modules."""


def model_layer(node: ir.Node) -> str:
    """The module of the model that a node was traced from, such as `model.layers.3.mlp`; "mask and positions" of none.

    Taken from what the exporter writes into each node's metadata.
    """
    scopes = node.metadata_props.get(_NAME_SCOPES)
    # The last scope is the operation itself.
    modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope] if scopes else []
    return modules[-1].removeprefix("model.") if modules else NO_LAYER
