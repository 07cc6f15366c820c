"""The rotary embedding of one rotation in a decoder's graph, against the model's own frequencies.

    angles [B,S,D/2] = position_ids * inv_freq;  cosines, sines = cos(angles) * scaling, sin(angles) * scaling

In: a `RotaryEmbedding` node. Out: what differs from the module `rotary_emb` of the trained model: the frequencies, with
the base that they look like, the scaling, or the form.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from c2c_export.check.graph.blocks import FloatArray
from c2c_export.check.graph.modules import decoder_layer
from c2c_export.check.graph.paths import ancestors, operand
from c2c_export.check.graph.stored import is_constant, read_constant


@dataclass(frozen=True, eq=False)
class _Angles:
    frequencies: FloatArray
    """[D/2]."""
    scaling: float


def rotary_problem(node: ir.Node, module: str, trained: PreTrainedModel) -> str | None:
    """What of the rotation `node`, in the attention `module`, is not the model's; None if all of it is."""
    layer = decoder_layer(module)
    if layer is None or layer >= trained.config.num_hidden_layers:
        return "it rotates outside of the model's layers"
    frequencies, scaling = _expected(trained, layer)
    if node.attributes.get_int("interleaved", 0) or node.attributes.get_int("rotary_embedding_dim", 0):
        return "it rotates other pairs of channels than the model"
    for index, operator in ((1, "Cos"), (2, "Sin")):
        angles = _read_angles(operand(node, index), operator)
        if angles is None:
            return f"its {operator.lower()} is not that of positions times constant frequencies"
        problem = _frequencies_problem(angles.frequencies, frequencies)
        if problem:
            return problem
        if np.float32(angles.scaling) != np.float32(scaling):
            return f"its cosines and sines are scaled by {angles.scaling:.6g}, expected {scaling:.6g}"
    return None


def _expected(trained: PreTrainedModel, layer: int) -> tuple[FloatArray, float]:
    """Frequencies [D/2] and scaling of a layer."""
    rotary = trained.get_submodule("model.rotary_emb")
    prefix = ""
    if not hasattr(rotary, "inv_freq"):  # one set for each type of layer
        prefix = f"{trained.config.layer_types[layer]}_"
    frequencies = getattr(rotary, f"{prefix}inv_freq").numpy()
    return frequencies, float(getattr(rotary, f"{prefix}attention_scaling"))


def _read_angles(value: ir.Value | None, operator: str) -> _Angles | None:
    """What the cosines or sines `value` are made of, if it is as in the module's docstring."""
    scaling = 1.0
    node = _before_casts(value)
    if node is not None and node.op_type == "Mul":
        constant = next((read_constant(value) for value in node.inputs if is_constant(value)), None)
        if constant is None or constant.numbers.size != 1:
            return None
        scaling = float(constant.numbers.reshape(-1)[0])
        node = _before_casts(next((value for value in node.inputs if not is_constant(value)), None))
    if node is None or node.op_type != operator:
        return None
    product = _before_casts(operand(node, 0))
    if product is None or product.op_type != "Mul":
        return None
    constant = next((read_constant(value) for value in product.inputs if is_constant(value)), None)
    nodes, inputs = ancestors(product.outputs[0])
    # Positions are only moved and cast on their way to the frequencies.
    computed = {node.op_type for node in nodes} - {"Mul", "Cast", "Unsqueeze", "Reshape", "Transpose", "Expand"}
    if constant is None or inputs != {"position_ids"} or computed:
        return None
    return _Angles(constant.numbers.reshape(-1), scaling)


def _before_casts(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Cast", "Identity"):
        source = operand(node, 0)
        node = None if source is None else source.producer()
    return node


def _frequencies_problem(found: FloatArray, expected: FloatArray) -> str | None:
    if found.shape != expected.shape:
        return f"it has {found.size} rotary frequencies, expected {expected.size}"
    wrong = np.flatnonzero(found != expected)
    if not len(wrong):
        return None
    first = int(wrong[0])
    message = (
        f"{len(wrong)} of {found.size} rotary frequencies are not the model's, the first is number {first}: "
        f"{found[first]:.6g}, expected {expected[first]:.6g}"
    )
    bases = _base(found), _base(expected)
    if bases[0] is not None and bases[1] is not None:
        message += f"; they are those of base {bases[0]:.6g}, expected {bases[1]:.6g}"
    return message


def _base(frequencies: FloatArray) -> float | None:
    """The base of which `frequencies` [n] are the powers 0, -1/n, -2/n, …; None where they are those of none."""
    if frequencies.size < 2 or not np.all(frequencies > 0):
        return None
    base = float(np.float64(frequencies[1]) ** -frequencies.size)
    powers = base ** (-np.arange(frequencies.size) / frequencies.size)
    return base if np.allclose(powers, frequencies, rtol=1e-4, atol=0) else None
