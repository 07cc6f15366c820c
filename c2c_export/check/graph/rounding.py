"""Whether a stored weight is the trained one, but for what its own format rounds away. Derived bounds, nothing tuned.

In: a `Stored` weight and the trained numbers. Out: the parts of it that are something else.

- float32: equal.
- float16, bfloat16: half a unit in the last place of the trained number.
- integers: each is the nearest to the trained number on the grid of its own block, or the grid's end where the number
  lies beyond it; and the block's root mean square error is at most half a step of the grid that goes evenly from the
  block's smallest to its largest number. A quantiser may choose another scale, and clip, only to err less than that.
  So a block whose scale, zero point or integers are another's is found, however coarse the format.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from c2c_export.check.graph.blocks import FloatArray, IntegerBlocks
from c2c_export.check.graph.stored import Stored

_ROWS_AT_ONCE = 4096
_MANTISSA_BITS = {ir.DataType.FLOAT16: 11, ir.DataType.BFLOAT16: 8}
"""The leading one included."""
_SMALLEST_STEP = {ir.DataType.FLOAT16: 2.0**-24, ir.DataType.BFLOAT16: 2.0**-133}
_FLOAT16_SCALE = 1 + 2.0**-10
"""A scale that is rounded up to float16 is larger by at most this factor."""


@dataclass(frozen=True)
class Misfits:
    """The wrong parts of a weight [R,K], in blocks of `width` columns; of a weight in floating point its columns are
    taken one by one. A vector is one row."""

    num_wrong: int
    num_all: int
    row: int
    """The first wrong one."""
    start: int
    """The column that its block begins with."""
    width: int
    found: float
    """What is furthest off in the block."""
    expected: float
    only_last: bool
    """Whether every wrong block is the last one of its row, and not each row's every block is last."""

    def describe(self) -> str:
        """In words, as the rest of a sentence that names the weight."""
        unit = "values" if self.width == 1 else f"blocks of {self.width} weights"
        where = f"row {self.row}, column {self.start}"
        if self.width > 1:
            where += f" to {self.start + self.width - 1}"
        last = "; all of them are the last of their row" if self.only_last and self.width > 1 else ""
        return (
            f"{self.num_wrong} of {self.num_all} {unit} are not the trained ones, the first in {where}: "
            f"{self.found:.6g} for {self.expected:.6g}{last}"
        )


def find_misfits(stored: Stored, trained: FloatArray) -> Misfits | None:
    """What of `stored` is not `trained`, of the same shape; None if all of it is."""
    numbers, expected = np.atleast_2d(stored.numbers), np.atleast_2d(trained)
    width = 1 if stored.blocks is None else stored.blocks.block_size
    wrong_parts = []
    for rows in _some_rows(len(expected)):
        if stored.blocks is not None:
            wrong_parts.append(_wrong_blocks(stored.blocks.rows(rows.start, rows.stop), expected[rows]))
        elif stored.dtype in _MANTISSA_BITS:
            allowed = _half_unit(expected[rows], stored.dtype)
            # Written so that what is not a number is wrong.
            wrong_parts.append(~(np.abs(numbers[rows] - expected[rows]) <= allowed))
        else:
            wrong_parts.append(numbers[rows] != expected[rows])
    wrong = np.concatenate(wrong_parts)
    if not wrong.any():
        return None
    row, block = (int(index) for index in np.argwhere(wrong)[0])
    columns = slice(block * width, min((block + 1) * width, expected.shape[1]))
    errors = np.abs(numbers[row, columns] - expected[row, columns])
    worst = columns.start + int(np.argmax(np.where(np.isfinite(errors), errors, np.inf)))
    return Misfits(
        num_wrong=int(wrong.sum()),
        num_all=wrong.size,
        row=row,
        start=columns.start,
        width=columns.stop - columns.start,
        found=float(numbers[row, worst]),
        expected=float(expected[row, worst]),
        only_last=wrong.shape[1] > 1 and not wrong[:, :-1].any(),
    )


def _some_rows(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, num_rows))


def _half_unit(numbers: FloatArray, dtype: ir.DataType) -> NDArray[np.float64]:
    """Half a unit in the last place of `dtype`, one of `_MANTISSA_BITS`, at each number."""
    _, exponents = np.frexp(numbers.astype(np.float64))
    return np.maximum(np.ldexp(0.5, exponents - _MANTISSA_BITS[dtype]), _SMALLEST_STEP[dtype] / 2)


def _wrong_blocks(blocks: IntegerBlocks, trained: FloatArray) -> NDArray[np.bool_]:
    """[R,blocks]: which are not the trained numbers [R,K] on the grid of their own."""
    is_real = blocks.blocked(np.ones(trained.shape, dtype=np.bool_))  # [R,blocks,block_size]
    expected, found = blocks.blocked(trained), blocks.blocked(blocks.numbers())
    integers, scales = blocks.blocked(blocks.integers), blocks.scales[:, :, np.newaxis]
    low = np.where(is_real, expected, np.inf).min(axis=2)
    high = np.where(is_real, expected, -np.inf).max(axis=2)
    of_offsets = _error_of_offsets(blocks, low, high)
    # The quantiser divided in float32, of which an integer of `bits` bits leaves this much of a step.
    nearest = scales * (0.5 + 2.0 ** (blocks.bits - 20)) + of_offsets[:, :, np.newaxis]
    errors = expected - found
    is_clipped = (integers == blocks.lowest) & (errors < 0)
    is_clipped |= (integers == blocks.lowest + 2**blocks.bits - 1) & (errors > 0)
    is_nearest = (np.abs(errors) <= nearest) | is_clipped | ~is_real
    squares = np.where(is_real, np.square(errors, dtype=np.float64), 0).sum(axis=2)
    largest = blocks.block_size * np.square(_even_step(blocks, low, high) / 2 + of_offsets)
    return ~(is_nearest.all(axis=2) & (squares <= largest) & (blocks.scales > 0))


def _even_step(blocks: IntegerBlocks, low: FloatArray, high: FloatArray) -> NDArray[np.float64]:
    """The step of the even grid over each block's range [R,blocks], a little more for rounded scales."""
    if blocks.offsets is not None:
        step = (high - low) / (2**blocks.bits - 1)
    elif blocks.has_zero_points:  # of which each is an integer of the grid, so that 0 lies on it
        step = (np.maximum(high, 0) - np.minimum(low, 0)) / (2**blocks.bits - 1)
    else:
        step = np.maximum(high, -low) / (2 ** (blocks.bits - 1) - 1)
    return step.astype(np.float64) * _FLOAT16_SCALE + _SMALLEST_STEP[ir.DataType.FLOAT16]


def _error_of_offsets(blocks: IntegerBlocks, low: FloatArray, high: FloatArray) -> NDArray[np.float64]:
    """How far each block's offset [R,blocks] may be from the one that was rounded; 0 without offsets.

    Offsets are integers in blocks too, along the row, and bound as such: their root mean square error is at most half a
    step of their range. An offset is what rounding a zero point leaves, at most half a step of its block, or what the
    block's range lies from 0.
    """
    if blocks.offsets is None:
        return np.zeros(low.shape)
    from_zero = np.maximum(low, 0) + np.maximum(-high, 0) + np.where(high < 0, high - low, 0)
    # A scale may be that of fewer steps over the range than the bits have, by a third.
    reach = (high - low) / (2**blocks.bits - 1) / 2 * 1.5 + from_zero
    padding = -reach.shape[1] % blocks.block_size
    grouped = np.pad(reach, ((0, 0), (0, padding))).reshape(len(reach), -1, blocks.block_size)
    step = 2 * grouped.max(axis=2).astype(np.float64) / (2**blocks.bits - 1)
    error = np.sqrt(blocks.block_size) * step / 2
    return np.repeat(error, blocks.block_size, axis=1)[:, : reach.shape[1]]
