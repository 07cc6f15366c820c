"""Weight-only quantisation: replace the constant weights of matrix products by integers and block-wise scales.

In: a portable graph in float32. Out: the same graph, changed in place: every constant right-hand matrix [K,N] of a
`MatMul` becomes int8 or int4 values with a standard `DequantizeLinear` before the product, symmetric (no zero point):

- int8: one scale per column [N];
- int4: one scale per column and block of K, [K/block,N]. 64 rows are a block, a size that TensorRT documents
  (https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-schemes.html), or 32 or 16
  where K is no multiple of 64. Each scale is that of a few candidates which gives the least squared error. The LM head
  is int8 all the same: what it errs goes straight into the logits (docs/accuracy.md).

`engines.precision.lower_precision` comes after it: it leaves the integers alone and makes the scales, and so what
`DequantizeLinear` gives, float16 or bfloat16. Scales are numbers that float16 holds exactly, and positive, as TensorRT
wants.

Not quantised: embeddings (`Gather`); one that is also the LM head keeps its float table and gets an integer copy. Nor
biases, norms, and the matrices that `float_weights` names, whose shape does not allow it. Activations and caches stay
in floating point. Calibration with data (AWQ, GPTQ) is not covered.
"""

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto
from onnx_ir.passes import common
from onnxruntime.quantization.quant_utils import quantize_nparray

from engines.constant_products import ConstantProduct, constant_products, lm_head, register_constant
from engines.precision import check_range

WeightPrecision = Literal["int8", "int4"]
FloatMatrix = NDArray[np.float32]

_BLOCK_SIZES = (64, 32, 16)
_SMALLEST_FLOAT16 = np.finfo(np.float16).smallest_subnormal
_LARGEST_INT8 = 127
_INT4_RANGE = ml_dtypes.iinfo(ml_dtypes.int4)
# A block's largest weight is mapped to one of these. Beyond 7 it is clipped, and the others are resolved finer.
_LARGEST_INT4 = (7.0, 7.5, 8.0, 8.5, 9.0)


@dataclass(frozen=True)
class _Quantized:
    values: NDArray[np.int8]
    """[K,N], in the range of the integer type."""
    scales: FloatMatrix
    """[N], or [K/block,N]."""

    @property
    def largest(self) -> FloatMatrix:
        """The largest absolute value that each scale stands for, in the shape of `scales`."""
        num_rows, num_columns = self.values.shape
        num_blocks = 1 if self.scales.ndim == 1 else len(self.scales)
        blocks = self.values.reshape(num_blocks, num_rows // num_blocks, num_columns)
        largest = np.maximum(blocks.max(axis=1), -blocks.min(axis=1).astype(np.int16))
        return largest.astype(np.float32).reshape(self.scales.shape) * self.scales


def quantize_weights(model: ir.Model, precision: WeightPrecision) -> int:
    """Quantise the weights of `model` in place; return how many matrices became integers.

    A matrix that several products share is quantised, and counted, once. What had to stay is told by `float_weights`.
    Raises `C2CError` naming the layer of a weight that float16, in which the engine computes, cannot hold.
    """
    head = lm_head(model.graph)
    products: dict[tuple[ir.Value, bool, WeightPrecision], list[ConstantProduct]] = {}
    for product in constant_products(model.graph):
        chosen: WeightPrecision = "int8" if product.node is head else precision
        if _block_size(product.shape, chosen) is not None:
            products.setdefault((product.weight, product.transposed, chosen), []).append(product)
    for (_, _, chosen), same in products.items():
        dequantized = _insert_dequantized(model.graph, same[0], chosen)
        for product in same:
            product.node.replace_input_with(1, dequantized)
    common.RemoveUnusedNodesPass()(model)
    return len(products)


def float_weights(model: ir.Model) -> list[str]:
    """The names of the constant matrices that products still read in floating point."""
    return sorted({str(product.weight.name) for product in constant_products(model.graph)})


def _block_size(shape: tuple[int, int], precision: WeightPrecision) -> int | None:
    """How many rows share a scale, or None where the shape does not allow this precision."""
    num_rows = shape[0]
    if precision == "int8":
        return num_rows
    # The blocks must divide K: what TensorRT makes of a shorter last block is not documented.
    block_size = next((size for size in _BLOCK_SIZES if num_rows % size == 0), None)
    # TensorRT refuses a matrix that is one block ("ScaleMode is illegal").
    return None if shape == (block_size, 1) else block_size


def _insert_dequantized(graph: ir.Graph, product: ConstantProduct, precision: WeightPrecision) -> ir.Value:
    weight = np.ascontiguousarray(product.matrix())
    check_range(weight, ir.DataType.FLOAT, product.node)
    block_size = _block_size(product.shape, precision)
    assert block_size is not None
    name = f"{product.weight.name}.{precision}"
    if precision == "int8":
        quantized, attributes = quantize_columns(weight), {"axis": 1}
        values = ir.Tensor(quantized.values, dtype=ir.DataType.INT8, name=name)
    else:
        quantized, attributes = quantize_blocks(weight, block_size), {"axis": 0, "block_size": block_size}
        values = ir.Tensor(quantized.values.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name=name)
    scales = ir.Tensor(quantized.scales, name=f"{name}.scales")
    node = ir.node("DequantizeLinear", [register_constant(graph, values), register_constant(graph, scales)], attributes)
    check_range(quantized.largest, ir.DataType.FLOAT16, product.node)
    dequantized = node.outputs[0]
    dequantized.name, dequantized.dtype = f"{name}.dequantized", ir.DataType.FLOAT
    dequantized.shape = ir.Shape(product.shape)
    graph.insert_before(product.node, node)
    return dequantized


def quantize_columns(weight: FloatMatrix) -> _Quantized:
    """int8 values and scales [N] of a weight [K,N]."""
    scales = _float16_not_below(np.abs(weight).max(axis=0) / _LARGEST_INT8)
    return _Quantized(_round(weight, scales, TensorProto.INT8), scales)


def quantize_blocks(weight: FloatMatrix, block_size: int) -> _Quantized:
    """int4 values, one per byte, and scales [K/block_size,N] of a weight [K,N]; `block_size` must divide K."""
    num_rows, num_columns = weight.shape
    blocks = weight.reshape(num_rows // block_size, block_size, num_columns)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    scales = np.zeros(largest.shape, dtype=np.float32)
    least_error = np.full(largest.shape, np.inf, dtype=np.float32)
    for levels in _LARGEST_INT4:
        candidate = _float16_not_below(largest / levels)
        error = _rounding_error(blocks, candidate)
        better = error < least_error
        np.copyto(scales, candidate, where=better)
        np.copyto(least_error, error, where=better)
    return _Quantized(_round(blocks, scales, TensorProto.INT4).reshape(weight.shape), scales[:, 0])


def _rounding_error(blocks: FloatMatrix, scales: FloatMatrix) -> FloatMatrix:
    """The sum over axis 1 of the squared differences that int4 makes."""
    # In place: these arrays are as large as the weight, and this is most of the time that quantising takes.
    rounded = blocks / scales
    np.rint(rounded, out=rounded)
    np.clip(rounded, _INT4_RANGE.min, _INT4_RANGE.max, out=rounded)
    rounded *= scales
    rounded -= blocks
    error: FloatMatrix = np.einsum("kbn,kbn->kn", rounded, rounded)[:, np.newaxis]
    return error


def _round(weight: FloatMatrix, scales: FloatMatrix, integer_type: int) -> NDArray[np.int8]:
    """Round to the nearest multiple of the scale, ties to even, and clip to the integer type."""
    return np.asarray(quantize_nparray(integer_type, weight, scales, zero_point=0)).astype(np.int8)


def _float16_not_below(scales: FloatMatrix) -> FloatMatrix:
    """The nearest float16 numbers that are positive and not below `scales`, so that no rounding goes past the range."""
    positive = np.maximum(scales, _SMALLEST_FLOAT16)
    nearest = positive.astype(np.float16)
    above = np.where(nearest < positive, np.nextafter(nearest, np.float16(np.inf)), nearest)
    return above.astype(np.float32)
