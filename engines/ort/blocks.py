"""Quantise a matrix in blocks of 32 rows, as ONNX Runtime's `MatMulNBits` reads it.

In: a weight [K,N] in float32. Out: `Blocks`: for each column and 32 rows of K a scale and a zero point, and unsigned
integers of 4 or 8 bits, of which a weight is `scale * (value - zero point)`. Padding beyond K multiplies nothing.

Each block takes, of a few candidates, the scale and zero point that give the least squared error. Among them are those
with which files of quantised models (.gguf) are written, so that such weights come back exactly where they can:

- 8 bits: Q8_0 (largest weight 127 steps), Q4_0 and Q5_0 (8 or 16 steps, here 112);
- 4 bits: Q4_0, and, where zero points may lie between integers (`quantize_with_offsets`), Q4_1 and Q4_K.

`quantize_with_offsets` gives what the rounding of the zero points leaves over as a matrix of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 32
Bits = Literal[4, 8]
FloatMatrix = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

# More would leave the processor's caches, and take twice as long.
_BLOCKS_AT_ONCE = 4096
_SMALLEST = np.float32(1e-30)
# Shares of a block's range that 4 bits resolve; what lies outside is clipped.
_SHARES_OF_RANGE = (1.0, 0.95, 0.9, 0.85, 0.8)
# Steps from a block's smallest to its largest weight, in files that do not use all of 0 to 15.
_STEPS_OF_RANGE = (15, 14, 13, 12, 11)
# Steps of a block's largest weight in 8 bits when the zero point is 128.
_SYMMETRIC_STEPS = (127, 112)


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix [K,N], its rows padded to whole blocks."""

    values: ByteArray
    """[N,blocks,32], one per byte."""
    scales: FloatMatrix
    """[N,blocks]."""
    zero_points: ByteArray
    """[N,blocks], one per byte."""
    bits: Bits
    error: float
    """The sum of the squared differences from the matrix, without padding."""

    def packed_values(self) -> ByteArray:
        """[N,blocks,32*bits/8]; of two values in a byte the first has the low bits."""
        return self.values if self.bits == 8 else _pack(self.values)

    def packed_zero_points(self) -> ByteArray:
        """[N,ceil(blocks*bits/8)], packed like the values."""
        return self.zero_points if self.bits == 8 else _pack(self.zero_points)

    def dequantized(self) -> FloatMatrix:
        """[K,N], K padded to whole blocks."""
        steps = self.values.astype(np.float32) - self.zero_points[:, :, np.newaxis]
        steps *= self.scales[:, :, np.newaxis]
        return steps.reshape(len(steps), -1).T

    def followed_by_offsets(self, offsets: "Blocks") -> "Blocks":
        """This matrix with the rows of its quantised offsets [blocks,N] behind its own."""
        return Blocks(
            np.concatenate([self.values, offsets.values], axis=1),
            np.concatenate([self.scales, offsets.scales], axis=1),
            np.concatenate([self.zero_points, offsets.zero_points], axis=1),
            self.bits,
            self.error + BLOCK_SIZE * offsets.error,
        )


@dataclass(frozen=True)
class _Fit:
    """Scales and zero points [n,1] of n blocks, values [n,32], and squared errors [n,1]."""

    values: FloatMatrix
    scales: FloatMatrix
    zero_points: FloatMatrix
    errors: FloatMatrix


def quantize(weight: FloatMatrix, bits: Bits) -> Blocks:
    """Blocks of `weight` [K,N] with integer zero points. The weights must be finite."""
    fitted = _fit_all(weight, _symmetric_or_range if bits == 8 else _clipped_range)
    return Blocks(fitted.values, fitted.scales, fitted.zero_points.astype(np.uint8), bits, fitted.error)


def quantize_with_offsets(weight: FloatMatrix) -> tuple[Blocks, FloatMatrix]:
    """4-bit blocks of `weight` [K,N], and offsets [K/32,N] that are to be added to every weight of a block.

    K must be a multiple of 32. The blocks' error is that with the offsets.
    """
    fitted = _fit_all(weight, _whole_range)
    rounded: FloatMatrix = np.rint(fitted.zero_points)
    np.clip(rounded, 0, 15, out=rounded)
    offsets = fitted.scales * (rounded - fitted.zero_points)
    return Blocks(fitted.values, fitted.scales, rounded.astype(np.uint8), 4, fitted.error), offsets.T


@dataclass(frozen=True)
class _FittedMatrix:
    """Like `Blocks`, with zero points in float32."""

    values: ByteArray
    scales: FloatMatrix
    zero_points: FloatMatrix
    error: float


def _fit_all(weight: FloatMatrix, candidates: Callable[[FloatMatrix], Iterator[_Fit]]) -> _FittedMatrix:
    """The best candidate of every block, some columns at a time."""
    num_rows, num_columns = weight.shape
    num_blocks = -(-num_rows // BLOCK_SIZE)
    values = np.empty((num_columns, num_blocks, BLOCK_SIZE), dtype=np.uint8)
    scales, zero_points = (np.empty((num_columns, num_blocks), dtype=np.float32) for _ in range(2))
    error = 0.0
    step = max(1, _BLOCKS_AT_ONCE // num_blocks)
    for start in range(0, num_columns, step):
        columns = slice(start, min(start + step, num_columns))
        # The padding repeats the last row, so that it asks for no wider range.
        padded = np.pad(weight[:, columns].T, ((0, 0), (0, -num_rows % BLOCK_SIZE)), mode="edge")
        best = _best(list(candidates(np.ascontiguousarray(padded).reshape(-1, BLOCK_SIZE))))
        values[columns] = best.values.reshape(-1, num_blocks, BLOCK_SIZE)
        scales[columns] = best.scales.reshape(-1, num_blocks)
        zero_points[columns] = best.zero_points.reshape(-1, num_blocks)
        error += float(best.errors.sum(dtype=np.float64))
        # The padding errs like the last row, so often.
        last = (values[columns, -1, -1] - zero_points[columns, -1]) * scales[columns, -1] - weight[-1, columns]
        error -= (-num_rows % BLOCK_SIZE) * float(np.square(last).sum(dtype=np.float64))
    return _FittedMatrix(values, scales, zero_points, error)


def _best(fits: list[_Fit]) -> _Fit:
    best = np.argmin([fit.errors[:, 0] for fit in fits], axis=0)[np.newaxis, :, np.newaxis]

    def chosen(name: str) -> FloatMatrix:
        stacked = np.stack([getattr(fit, name) for fit in fits])
        result: FloatMatrix = np.take_along_axis(stacked, best, axis=0)[0]
        return result

    return _Fit(chosen("values"), chosen("scales"), chosen("zero_points"), chosen("errors"))


def _symmetric_or_range(blocks: FloatMatrix) -> Iterator[_Fit]:
    """8 bits: the whole range, or a zero point of 128."""
    low, high = _range(blocks)
    scales = np.maximum((high - low) / 255, _SMALLEST)
    yield _rounded(blocks, scales, np.rint(-low / scales), 255)
    largest = np.maximum(high, -low)
    for steps in _SYMMETRIC_STEPS:
        scales = np.maximum(largest / steps, _SMALLEST)
        yield _rounded(blocks, scales, np.full_like(scales, 128), 255)


def _clipped_range(blocks: FloatMatrix) -> Iterator[_Fit]:
    """4 bits, integer zero points: a share of the range, and the scale that suits the integers best."""
    low, high = _range(blocks)
    for share in _SHARES_OF_RANGE:
        scales = np.maximum((high - low) * np.float32(share / 15), _SMALLEST)
        zero_points = np.clip(np.rint(-low * np.float32(share) / scales), 0, 15)
        steps = np.clip(np.rint(blocks / scales) + zero_points, 0, 15) - zero_points
        squares = _dot(steps, steps)
        better = _dot(steps, blocks) / np.maximum(squares, 1)
        yield _rounded(blocks, np.where(better > 0, better, scales), zero_points, 15)
    largest = np.where(high > -low, high, low)
    # Q4_0: the largest weight, of either sign, is -8 steps; a step is positive here.
    scales = np.maximum(np.abs(largest) / 8, _SMALLEST)
    yield _rounded(blocks, scales, np.where(largest < 0, np.float32(8), np.float32(7)), 15)


def _whole_range(blocks: FloatMatrix) -> Iterator[_Fit]:
    """4 bits, any zero points: the range in so many steps."""
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    for steps in _STEPS_OF_RANGE:
        scales = np.maximum((high - low) / steps, np.maximum(np.abs(low) * np.float32(1e-6), _SMALLEST))
        yield _rounded(blocks, scales, -low / scales, 15)


def _rounded(blocks: FloatMatrix, scales: FloatMatrix, zero_points: FloatMatrix, largest: int) -> _Fit:
    values = blocks / scales
    values += zero_points
    np.rint(values, out=values)
    np.clip(values, 0, largest, out=values)
    differences = values - zero_points
    differences *= scales
    differences -= blocks
    return _Fit(values, scales, zero_points, _dot(differences, differences))


def _range(blocks: FloatMatrix) -> tuple[FloatMatrix, FloatMatrix]:
    """The smallest and largest weight of each block [n,1], or 0 where that is beyond them."""
    zero = np.float32(0)
    low, high = blocks.min(axis=1, keepdims=True, initial=zero), blocks.max(axis=1, keepdims=True, initial=zero)
    return low, high


def _dot(left: FloatMatrix, right: FloatMatrix) -> FloatMatrix:
    result: FloatMatrix = np.einsum("nk,nk->n", left, right)[:, np.newaxis]
    return result


def _pack(values: ByteArray) -> ByteArray:
    """Two 4-bit values of the last axis in a byte, the first in the low bits; an odd last one is followed by zero."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., ::2] | (values[..., 1::2] << np.uint8(4))
