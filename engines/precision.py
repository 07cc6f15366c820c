"""Make a strongly typed fp16 or bf16 graph from a portable fp32 graph.

In: a portable graph in float32, its weights possibly quantised already (integers read through `DequantizeLinear`). Out:
the same graph, changed in place, with float16 or bfloat16 weights, activations and caches, and explicit casts wherever
the precision changes, so that an engine has nothing left to decide. Float32 remain

- a decoder's residual stream: every sum of what a layer adds, a scaled embedding that it begins with, and the RMS norms
  that read it. Gemma 3's reaches 104,000 where float16 ends at 65,504, bfloat16's 8 bits lose what a single layer adds
  to it, and Gemma's scale of the embedding would be off by 0.2 % in them. What a norm gives is rounded;
- the statistics of every RMS norm: `stash_type` 1 of `RMSNormalization`, a sum of squares over hundreds of channels
  that overflows float16 and loses most of its bits in bfloat16. Nothing is inserted for it; the operator says so;
- the rotary angles, their cosines and sines: a bfloat16 angle has 8 bits, so neighbouring positions would fall
  together. Only the finished cosines and sines, numbers in [-1, 1], are rounded;
- a fuser's sums, norms, weights per head (its sigmoid) and products with them, down to the row that is written into the
  cache: the weight scales a whole correction, and the sums are few. Its matrix products and GELUs are not;
- the logits output, which the sampler reads. The product with the vocabulary itself is in the low precision.

The softmax of `Attention` has no cast either: TensorRT's parser refuses the attribute `softmax_precision`, and the
precision of the scores inside an attention kernel is the kernel's own.

Not covered: loss scaling or clamping of activations that leave float16's range; docs/accuracy.md has the measurements.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from c2c_export.errors import C2CError
from engines.model_layers import model_layer

_FLOAT = ir.DataType.FLOAT
DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# What lies beyond is rounded to infinity.
_OVERFLOWS_FLOAT16 = 65_520.0
_ANGLE_OPERATORS = frozenset({"Cos", "Sin"})
_FUSER_FLOAT32 = frozenset({"Add", "Mul", "Sigmoid", "RMSNormalization"})
# They move values and compute nothing.
_LAYOUT_OPERATORS = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze"})


def lower_precision(model: ir.Model, precision: str, *, is_fuser: bool) -> int:
    """Retype `model` to `precision`, "fp16" or "bf16"; return how many casts were inserted.

    Weights are converted when they are read, so a model larger than the memory can be retyped and saved.

    Raises `C2CError` naming a weight of which a value is not finite or does not fit into float16, or another precision.
    """
    if precision not in DTYPES:
        raise C2CError(f"precision {precision!r}: expected one of {', '.join(DTYPES)}")
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    # Nodes that a fusion rule wrote carry no types.
    common.ShapeInferencePass()(model)
    untyped = [node.name for node in model.graph if any(value.dtype is None for value in node.outputs)]
    if untyped:
        raise C2CError(f"node {untyped[0]}: its output has no known type, so it cannot be lowered to {precision}")
    return _Retyping(model, DTYPES[precision], is_fuser).run()


class _Retyping:
    def __init__(self, model: ir.Model, dtype: ir.DataType, is_fuser: bool) -> None:
        self._graph = model.graph
        self._dtype = dtype
        self._is_fuser = is_fuser
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._num_casts = 0
        # float32 values that belong to a residual stream: a norm of one, and nothing else, is computed in float32 too.
        self._residuals: set[ir.Value] = set()

    def run(self) -> int:
        for value in self._graph.inputs:
            if value.dtype == _FLOAT:
                value.dtype = self._dtype
        for node in list(self._graph):
            if node.op_type == "Cast" and not _is_float(node.inputs[0]):
                continue  # positions become float32 angles
            if self._stays_float32(node):
                self._use(node, _FLOAT)
            else:
                self._use(node, self._dtype)
                self._give(node)
        for index, output in enumerate(self._graph.outputs):
            if output.name == "logits":
                self._graph.outputs[index] = self._logits_in_float32(output)
        for weight in list(self._graph.initializers.values()):
            if not weight.uses() and not weight.is_graph_output():
                self._graph.initializers.pop(weight.name)
        return self._num_casts

    def _stays_float32(self, node: ir.Node) -> bool:
        if node.op_type in _ANGLE_OPERATORS or (self._is_fuser and node.op_type in _FUSER_FLOAT32):
            return True
        computed = [value for value in _float_inputs(node) if not value.is_initializer()]
        is_float32 = bool(computed) and all(value.dtype == _FLOAT for value in computed)
        if self._is_fuser:
            return is_float32 and node.op_type in _LAYOUT_OPERATORS
        if _adds_to_residual(node) or _begins_residual(node):
            self._residuals.add(node.outputs[0])
            return True
        if not self._residuals.isdisjoint(_float_inputs(node)):
            # The choice of the last token's row is that row; and onnx's type inference wants a norm's input, weight
            # and output in one type.
            stays = node.op_type in ("RMSNormalization", "GatherElements")
            if stays:
                self._residuals.update(node.outputs)
            return stays
        # What is computed from positions and constants alone is an angle.
        return is_float32 and node.op_type != "RotaryEmbedding"

    def _use(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Let `node` read its floating-point inputs as `dtype`."""
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value) and value.dtype != dtype:
                node.replace_input_with(index, self._cast(value, dtype, before=node))

    def _give(self, node: ir.Node) -> None:
        """Let `node` write its floating-point outputs in the low precision."""
        for attribute in ("to", "output_dtype"):  # of Cast and of DequantizeLinear
            if attribute in node.attributes and node.attributes.get_int(attribute) == _FLOAT.value:
                node.attributes[attribute] = ir.AttrInt64(attribute, self._dtype.value)
        for output in node.outputs:
            if output.dtype == _FLOAT:
                output.dtype = self._dtype

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        if (value, dtype) not in self._casts:
            if value.is_initializer():
                self._casts[value, dtype] = self._retyped_weight(value, dtype, before)
            else:
                cast = self._new_cast(value, dtype, f"{value.name}.{dtype.name.lower()}", like=before)
                self._graph.insert_before(before, cast)
                self._casts[value, dtype] = cast.outputs[0]
        return self._casts[value, dtype]

    def _new_cast(self, value: ir.Value, dtype: ir.DataType, name: str, like: ir.Node) -> ir.Node:
        scopes = dict(like.metadata_props)  # an engine that fails on the cast names the model's layer
        cast = ir.node("Cast", [value], {"to": dtype.value}, name=f"cast.{name}", metadata_props=scopes)
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = name, dtype, value.shape
        self._num_casts += 1
        return cast

    def _retyped_weight(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        name = f"{value.name}.{dtype.name.lower()}"
        weight = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        if dtype != _FLOAT:
            check_range(tensor.numpy(), dtype, reader)
        weight.const_value = ir.LazyTensor(
            lambda: ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=name),
            dtype=dtype,
            shape=tensor.shape,
            name=name,
        )
        self._graph.register_initializer(weight)
        return weight

    def _logits_in_float32(self, logits: ir.Value) -> ir.Value:
        producer = logits.producer()
        assert producer is not None
        logits.name = f"logits.{self._dtype.name.lower()}"
        cast = self._new_cast(logits, _FLOAT, "logits", like=producer)
        self._graph.append(cast)
        return cast.outputs[0]


def _adds_to_residual(node: ir.Node) -> bool:
    """Whether `node` adds two computed values, not a bias, and a norm or the next layer's sum reads the result."""
    if node.op_type != "Add" or any(value.is_initializer() for value in _float_inputs(node)):
        return False
    return any(use.node.op_type in ("RMSNormalization", "Add") for use in node.outputs[0].uses())


def _begins_residual(node: ir.Node) -> bool:
    """Whether `node` scales what a residual stream begins with, as Gemma scales its embeddings."""
    return node.op_type == "Mul" and any(_adds_to_residual(use.node) for use in node.outputs[0].uses())


def check_range(weight: NDArray[np.generic], dtype: ir.DataType, reader: ir.Node) -> None:
    """Raise `C2CError` naming the model's layer unless every value is finite in `dtype`; `reader` reads the weight."""
    largest = max(weight.max(initial=0), -weight.min(initial=0))
    if dtype == ir.DataType.FLOAT16 and np.isfinite(largest) and largest >= _OVERFLOWS_FLOAT16:
        raise C2CError(
            f"layer {model_layer(reader)}: a weight of {largest:.6g} does not fit into float16, in which int8 and int4 "
            "engines compute as well; build in bf16"
        )
    if not np.isfinite(largest):
        raise C2CError(f"layer {model_layer(reader)}: a weight is {largest}, expected finite weights; mend the model")


def _float_inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and _is_float(value)]


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in (_FLOAT, *DTYPES.values())
