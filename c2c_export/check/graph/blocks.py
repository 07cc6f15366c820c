"""A matrix in integers, and the numbers that they stand for: scales and zero points by block, and offsets."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class IntegerBlocks:
    """A matrix [R,K] in integers: `block_size` columns of a row share a scale and a zero point.

    A number is `scale * (integer - zero point)`, and where there are offsets that plus its block's offset.
    """

    bits: int
    block_size: int
    integers: NDArray[np.int16]
    """[R,K]."""
    scales: FloatArray
    """[R,ceil(K/block_size)]."""
    zero_points: NDArray[np.int16]
    """Like the scales; all 0 where the operator has none."""
    lowest: int
    """The smallest integer that the type holds; the largest is `lowest + 2**bits - 1`."""
    has_zero_points: bool
    """Whether each block may have another zero point; else the grid lies about 0."""
    offsets: FloatArray | None = None
    """Like the scales."""

    def blocked(self, array: NDArray[Any]) -> NDArray[Any]:
        """`array` [R,K] as [R,blocks,block_size]; what lacks to whole blocks is 0."""
        padding = self.scales.shape[1] * self.block_size - array.shape[1]
        padded = np.pad(array, ((0, 0), (0, padding))) if padding else array
        return padded.reshape(len(array), -1, self.block_size)

    def numbers(self) -> FloatArray:
        """[R,K] in float32."""
        steps = (self.blocked(self.integers) - self.zero_points[:, :, np.newaxis]).astype(np.float32)
        steps *= self.scales[:, :, np.newaxis]
        if self.offsets is not None:
            steps += self.offsets[:, :, np.newaxis]
        return steps.reshape(len(steps), -1)[:, : self.integers.shape[1]]

    def rows(self, start: int, stop: int) -> "IntegerBlocks":
        """Those of rows `start` to `stop`."""
        part = slice(start, stop)
        return replace(
            self,
            integers=self.integers[part],
            scales=self.scales[part],
            zero_points=self.zero_points[part],
            offsets=None if self.offsets is None else self.offsets[part],
        )
