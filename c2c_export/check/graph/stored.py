"""Constant operands as a graph stores them, and the numbers that they stand for.

In: an operand of a node that is constant, given directly or through `DequantizeLinear`, `Transpose`, `Cast` or
`Identity`; or the integer operands of `MatMulNBits` and `GatherBlockQuantized`. Out: a `Stored`, whose numbers are
computed here as the operators' documentation says, apart from the code that quantised them:
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

Not covered: scales per tensor, integers of other than 4 or 8 bits, zero points between integers. They raise
`UnreadableConstant`.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from c2c_export.check.graph.blocks import FloatArray, IntegerBlocks
from c2c_export.errors import C2CError

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_UNCHANGED = ("Transpose", "Identity", "Cast")
_SIGNED = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}
_UNSIGNED = {ir.DataType.UINT4: 4, ir.DataType.UINT8: 8}


class UnreadableConstant(C2CError):
    """A constant that is stored in a form which nothing here reads; the message says which node and what is wrong."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant: its numbers, the floating-point type that they are read in, and its integers, if it has any."""

    numbers: FloatArray
    dtype: ir.DataType
    blocks: IntegerBlocks | None = None
    """Of a matrix in integers. A row of the blocks is what torch has as a row: what gives one output, or one token's
    embedding. In a product's right-hand side [K,N] that is a column."""

    def transposed(self) -> "Stored":
        """The right-hand side [K,N] of a product as torch holds it, [N,K]."""
        return replace(self, numbers=self.numbers.T)


def is_constant(value: ir.Value | None) -> bool:
    """Whether `read_constant` finds floating-point numbers in `value`, or cannot read what should be some."""
    while value is not None:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return tensor.dtype in _FLOATS
        node = value.producer()
        if node is not None and node.op_type == "DequantizeLinear":
            return ir.convenience.get_const_tensor(node.inputs[0]) is not None
        value = node.inputs[0] if node is not None and node.op_type in _UNCHANGED else None
    return False


def read_constant(value: ir.Value | None) -> Stored | None:
    """The floating-point constant `value`; None where it is computed from inputs or holds no floating-point numbers.

    Raises `UnreadableConstant`.
    """
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return Stored(tensor.numpy().astype(np.float32, copy=False), tensor.dtype) if tensor.dtype in _FLOATS else None
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        return _read_dequantize(node)
    if node.op_type not in _UNCHANGED:
        return None
    source = read_constant(node.inputs[0])
    if source is None or node.op_type == "Identity":
        return source
    if node.op_type == "Cast":
        return _cast(source, ir.DataType(node.attributes.get_int("to")), node)
    return _transposed(source, node)


def read_constant_integers(value: ir.Value | None) -> NDArray[np.int64] | None:
    """The constant `value` of integers, such as a window or the numbers of rows; None where it is none."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return tensor.numpy().astype(np.int64)


def read_product_blocks(node: ir.Node) -> Stored:
    """The right-hand matrix of a `MatMulNBits` as torch holds it, [N,K], without the rows of its offsets.

    Raises `UnreadableConstant`.
    """
    bits, block_size = _supported_bits(node), node.attributes.get_int("block_size")
    num_columns, num_rows = node.attributes.get_int("N"), node.attributes.get_int("K")
    if any(value is not None for value in node.inputs[4:]):
        raise UnreadableConstant(f"node {node.name}: MatMulNBits with a permutation or a bias")
    num_blocks = -(-num_rows // block_size)
    packed = _sized(node, _unsigned_bytes(node, 1), num_columns, num_blocks * block_size * bits // 8)
    integers = _unpacked(packed, bits)[:, :num_rows]
    scales = _sized(node, _floats(node, 2), num_columns, num_blocks)
    has_zero_points = len(node.inputs) > 3 and node.inputs[3] is not None
    if has_zero_points:
        stored = _sized(node, _unsigned_bytes(node, 3), num_columns, -(-num_blocks * bits // 8))
        zero_points = _unpacked(stored, bits)[:, :num_blocks]
    else:
        zero_points = np.full(scales.shape, 2 ** (bits - 1), dtype=np.int16)
    blocks = IntegerBlocks(bits, block_size, integers, scales, zero_points, 0, has_zero_points)
    num_sums = _number_of_sums(node, num_rows, block_size)
    if num_sums:
        blocks = _with_offsets(blocks, num_rows - num_sums)
    return Stored(blocks.numbers(), ir.DataType.FLOAT, blocks)


def read_table_blocks(node: ir.Node) -> Stored:
    """The table [V,K] of a `GatherBlockQuantized` over whole rows. Raises `UnreadableConstant`.

    In 8 bits it may also lie as [V,blocks,block size], one scale a block, as it does where an LM head holds it.
    """
    bits, block_size = _supported_bits(node), node.attributes.get_int("block_size", 128)
    axes = node.attributes.get_int("gather_axis", 0), node.attributes.get_int("quantize_axis", 1)
    stored = _unsigned_bytes(node, 0)
    lies_in_blocks = bits == 8 and stored.ndim == 3 and stored.shape[2] == block_size and axes == (0, 2)
    if not lies_in_blocks and (stored.ndim != 2 or axes != (0, 1)):
        raise UnreadableConstant(f"node {node.name}: a table that is looked up or quantised along another axis")
    stored = stored.reshape(len(stored), -1)
    integers = stored.astype(np.int16) if bits == 8 else _unpacked(stored, bits)
    has_zero_points = len(node.inputs) > 3 and node.inputs[3] is not None
    num_rows, num_blocks = len(integers), -(-integers.shape[1] // block_size)
    scales = _sized(node, _floats(node, 2), num_rows, num_blocks)
    if has_zero_points:
        zero_points = _unpacked(_sized(node, _unsigned_bytes(node, 3), num_rows, -(-num_blocks * bits // 8)), bits)
        zero_points = zero_points[:, :num_blocks]
    else:
        zero_points = np.full(scales.shape, 2 ** (bits - 1), dtype=np.int16)
    blocks = IntegerBlocks(bits, block_size, integers, scales, zero_points, 0, has_zero_points)
    return Stored(blocks.numbers(), ir.DataType.FLOAT, blocks)


def _read_dequantize(node: ir.Node) -> Stored:
    """`DequantizeLinear` of a right-hand side [K,N] with one scale a column, or one a column and block of K."""
    tensor = _constant_operand(node, 0)
    bits = _SIGNED.get(tensor.dtype) or _UNSIGNED.get(tensor.dtype)
    scale_tensor = _constant_operand(node, 1)
    scales = scale_tensor.numpy().astype(np.float32)
    if bits is None or len(tensor.shape) != 2 or scale_tensor.dtype not in _FLOATS:
        raise UnreadableConstant(f"node {node.name}: DequantizeLinear of {tensor.dtype.name} {list(tensor.shape)}")
    rows, columns = (int(size) for size in tensor.shape)
    axis = node.attributes.get_int("axis", 1) % 2
    block_size = node.attributes.get_int("block_size", 0)
    if block_size and axis == 0:
        scales = scales.reshape(-1, columns).T
    elif not block_size and axis == 1 and scales.shape == (columns,):
        scales, block_size = scales[:, np.newaxis], rows
    else:
        raise UnreadableConstant(f"node {node.name}: DequantizeLinear with scales {list(scales.shape)} of axis {axis}")
    has_zero_points = len(node.inputs) > 2 and node.inputs[2] is not None
    zero_points = np.zeros(scales.shape, dtype=np.int16)
    if has_zero_points:
        zero_points = _constant_operand(node, 2).numpy().astype(np.int16).reshape(-1, columns).T
    lowest = -(2 ** (bits - 1)) if tensor.dtype in _SIGNED else 0
    integers = tensor.numpy().astype(np.int16).T
    blocks = IntegerBlocks(bits, block_size, integers, scales, zero_points, lowest, has_zero_points)
    dtype = ir.DataType(node.attributes.get_int("output_dtype", 0) or scale_tensor.dtype)
    # The operator rounds its products to the type that it gives.
    numbers = blocks.numbers().astype(dtype.numpy()).astype(np.float32)
    return Stored(numbers.T, dtype, blocks)


def _transposed(source: Stored, node: ir.Node) -> Stored:
    order = tuple(node.attributes.get_ints("perm", tuple(reversed(range(source.numbers.ndim)))))
    if source.blocks is not None:
        raise UnreadableConstant(f"node {node.name}: a matrix of integers is transposed after it was dequantised")
    return replace(source, numbers=source.numbers.transpose(order))


def _cast(source: Stored, dtype: ir.DataType, node: ir.Node) -> Stored:
    if dtype not in _FLOATS:
        raise UnreadableConstant(f"node {node.name}: a constant is cast to {dtype.name}")
    return replace(source, numbers=source.numbers.astype(dtype.numpy()).astype(np.float32), dtype=dtype)


def _number_of_sums(node: ir.Node, num_rows: int, block_size: int) -> int:
    """How many of the K rows multiply sums of `block_size` activations each, which stand behind the activations."""
    concatenation = _producer_of(node, 0, "Concat")
    summed = None if concatenation is None else _producer_of(concatenation, 1, "ReduceSum")
    blocked = None if summed is None else _producer_of(summed, 0, "Reshape")
    if concatenation is None or summed is None or blocked is None or len(concatenation.inputs) != 2:
        return 0
    if blocked.inputs[0] is not concatenation.inputs[0]:
        return 0
    shape, axes = read_constant_integers(blocked.inputs[1]), read_constant_integers(summed.inputs[1])
    num_sums, rest = divmod(num_rows, block_size + 1)
    is_known = shape is not None and list(shape[-2:]) == [-1, block_size] and axes is not None and list(axes) == [-1]
    if not is_known or rest or concatenation.attributes.get_int("axis") not in (-1, 2):
        raise UnreadableConstant(f"node {node.name}: what is put behind its activations is no sum of each block")
    return num_sums


def _producer_of(node: ir.Node, index: int, op_type: str) -> ir.Node | None:
    """The node that computes an input, if it is of this operator."""
    value = node.inputs[index] if index < len(node.inputs) else None
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == op_type else None


def _with_offsets(blocks: IntegerBlocks, num_rows: int) -> IntegerBlocks:
    num_blocks = num_rows // blocks.block_size
    return replace(
        blocks,
        integers=blocks.integers[:, :num_rows],
        scales=blocks.scales[:, :num_blocks],
        zero_points=blocks.zero_points[:, :num_blocks],
        offsets=blocks.numbers()[:, num_rows:],
    )


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    """Integers of 4 bits, of which the first of a byte has the low bits; those of 8 bits are as they are."""
    if bits == 8:
        return packed.astype(np.int16)
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1).astype(np.int16)


def _sized(node: ir.Node, array: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """`array`, of any shape, as [rows,columns]."""
    if array.size != rows * columns:
        raise UnreadableConstant(
            f"node {node.name}: an operand has {array.size} elements, expected {rows} times {columns} by its attributes"
        )
    return array.reshape(rows, columns)


def _supported_bits(node: ir.Node) -> int:
    bits = int(node.attributes.get_int("bits", 4))
    if bits not in (4, 8):
        raise UnreadableConstant(f"node {node.name}: {node.op_type} of {bits} bits, expected 4 or 8")
    return bits


def _unsigned_bytes(node: ir.Node, index: int) -> NDArray[np.uint8]:
    tensor = _constant_operand(node, index)
    if tensor.dtype != ir.DataType.UINT8:
        raise UnreadableConstant(f"node {node.name}: operand {index} is {tensor.dtype.name}, expected UINT8")
    return tensor.numpy()


def _floats(node: ir.Node, index: int) -> FloatArray:
    tensor = _constant_operand(node, index)
    if tensor.dtype != ir.DataType.FLOAT:
        raise UnreadableConstant(f"node {node.name}: operand {index} is {tensor.dtype.name}, expected FLOAT")
    return tensor.numpy()


def _constant_operand(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise UnreadableConstant(f"node {node.name}: operand {index} of {node.op_type} is not constant")
    return tensor
