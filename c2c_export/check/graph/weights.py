"""Find the trained parameters in an engine's graph.

In: a decoder's or fuser's graph, portable or lowered for any target. Out: `GraphWeights`: each weight that the graph
holds, under the name that it has in torch, and every other floating-point constant. A weight is known by the module
that its node was traced from, never by its own name: the exporter lets equal constants share one.

Not covered: whether the weights are right (`c2c_export.check.levels.weights`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from c2c_export.check.graph.blocks import FloatArray
from c2c_export.check.graph.modules import parameter_name, submodule
from c2c_export.check.graph.paths import operand
from c2c_export.check.graph.stored import (
    Stored,
    UnreadableConstant,
    is_constant,
    read_constant,
    read_product_blocks,
    read_table_blocks,
)
from engines.model_layers import NO_LAYER, model_layer

_INTEGER_OPERATORS = {"MatMulNBits": read_product_blocks, "GatherBlockQuantized": read_table_blocks}
_WEIGHT_OPERAND = {"MatMul": 1, "FusedMatMul": 1, "RMSNormalization": 1, "Gather": 0}


@dataclass(frozen=True, eq=False)
class HeldWeight:
    """A trained parameter as one node of the graph reads it."""

    name: str
    """As in torch's state dict; in a fuser "<projector>.<state name>"."""
    module: str
    node: ir.Node
    index: int
    """Which of the node's inputs it is, or its first one."""
    added: float = 0.0
    """What the module adds to its parameter before it multiplies: Gemma's norms add 1, and the graph holds the sum."""

    def read(self) -> Stored:
        """What is stored, oriented as in torch. Raises `UnreadableConstant` for a form that nothing reads."""
        if self.node.op_type in _INTEGER_OPERATORS:
            return _INTEGER_OPERATORS[self.node.op_type](self.node)
        stored = read_constant(self.node.inputs[self.index])
        if stored is None:
            raise UnreadableConstant(f"node {self.node.name}: operand {self.index} is not constant")
        is_product = self.node.op_type in ("MatMul", "FusedMatMul")
        return stored.transposed() if is_product and not self.node.attributes.get_int("transB", 0) else stored

    def parameter(self) -> FloatArray:
        """The values that torch's parameter must have to compute what the graph does; errors as in `read`."""
        numbers = self.read().numbers
        return numbers - np.float32(self.added) if self.added else numbers


@dataclass(frozen=True, eq=False)
class OtherConstant:
    """A floating-point constant that is no parameter: a scale, rotary frequencies."""

    module: str
    node: ir.Node
    index: int
    """Which of the node's inputs it is."""

    def read(self) -> FloatArray:
        """Its numbers; errors as in `read_constant`."""
        stored = read_constant(self.node.inputs[self.index])
        assert stored is not None
        return stored.numbers


@dataclass(frozen=True, eq=False)
class GraphWeights:
    """See the module's docstring. Nothing is read from the weights' file before it is asked for."""

    held: Mapping[str, Sequence[HeldWeight]]
    """By name; several where several nodes read a parameter, each with a copy of its own or all with one."""
    others: Sequence[OtherConstant]

    def parameters(self) -> dict[str, FloatArray]:
        """All values by name, float32, for `TrainedDecoder.holding` or `TrainedFuser.holding`.

        A tied model's embedding and LM head are two names, `model.embed_tokens.weight` and `lm_head.weight`, whose
        values may differ, as each may be rounded in its own way. Raises `UnreadableConstant`.
        """
        return {name: held[0].parameter() for name, held in self.held.items()}


def read_graph_weights(graph: ir.Model, trained: PreTrainedModel | None = None) -> GraphWeights:
    """The weights of `graph`; `trained` is the model that it was traced from, or None for a fuser."""
    held: dict[str, list[HeldWeight]] = {}
    others: list[OtherConstant] = []
    for node in graph.graph:
        weight = _weight_of(node, trained)
        if weight is not None:
            held.setdefault(weight.name, []).append(weight)
        # A product of a constant is one constant, whatever it is made of.
        if node.op_type not in ("DequantizeLinear", "Transpose", "Identity", "Cast", *_INTEGER_OPERATORS):
            others.extend(
                OtherConstant(model_layer(node), node, index)
                for index, value in enumerate(node.inputs)
                if is_constant(value) and (weight is None or index != weight.index)
            )
    return GraphWeights(held, others)


def _weight_of(node: ir.Node, trained: PreTrainedModel | None) -> HeldWeight | None:
    """The parameter that `node` reads, if it reads one."""
    module = model_layer(node)
    if module == NO_LAYER:
        return None
    if node.op_type in _INTEGER_OPERATORS:
        index = 0 if node.op_type == "GatherBlockQuantized" else 1
        return HeldWeight(parameter_name(module, "weight"), module, node, index)
    if node.op_type == "Add":
        constant = next((index for index, value in enumerate(node.inputs) if is_constant(value)), None)
        return None if constant is None else HeldWeight(parameter_name(module, "bias"), module, node, constant)
    index_of_weight = _WEIGHT_OPERAND.get(node.op_type)
    if index_of_weight is None or not is_constant(operand(node, index_of_weight)):
        return None
    is_norm = node.op_type == "RMSNormalization"
    added = _added_by(trained, module) if is_norm and trained is not None else 0.0
    return HeldWeight(parameter_name(module, "weight", is_norm=is_norm), module, node, index_of_weight, added)


def _added_by(trained: PreTrainedModel, module: str) -> float:
    """What a norm of the model multiplies with where its parameter is 0."""
    norm = submodule(trained, module)
    weight = getattr(norm, "weight", None)
    if norm is None or weight is None or weight.ndim != 1:
        return 0.0  # no norm, which the comparison of parameters tells
    zeros = torch.zeros_like(weight)
    # So large that the norm's epsilon is nothing.
    large = torch.full_like(weight, 2.0**20)
    with torch.no_grad():
        return float(torch.func.functional_call(norm, {"weight": zeros}, (large,))[0])
