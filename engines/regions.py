"""Where a part of a buffer lies in memory, for copies that a device makes by itself.

In: a buffer's shape, an index of integers and slices, and the size of an element. Out: the equally spaced runs of bytes
that the part consists of, which is what a two-dimensional copy takes. Not covered: steps other than 1, and parts that
are no such runs (two separate dimensions cut at once).
"""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Region:
    """`height` runs of `width` bytes each, `pitch` bytes from one's start to the next's, the first at `offset`."""

    offset: int
    width: int
    height: int
    pitch: int
    shape: tuple[int, ...]
    """Of the part, as numpy would index it."""

    @property
    def num_bytes(self) -> int:
        """Size of the part."""
        return self.width * self.height


def region_of(shape: tuple[int, ...], index: tuple[int | slice, ...], item_size: int) -> Region:
    """The region of `array[index]`, for a C-contiguous array of `shape` with elements of `item_size` bytes.

    Raises `IndexError` for an index out of range, and `ValueError` for a step or a part that no region describes.
    """
    if len(index) > len(shape):
        raise IndexError(f"{len(index)} indices for a buffer of shape {shape}")
    offset, extents, part_shape = 0, [], []
    stride = prod(shape)
    for axis, size in enumerate(shape):
        stride = stride // size if size else 0
        start, extent, kept = _along_axis(index[axis] if axis < len(index) else slice(None), size)
        offset += start * stride
        extents.append((extent, stride))
        if kept:
            part_shape.append(extent)
    if not all(extent for extent, _ in extents):
        return Region(offset * item_size, 0, 0, 0, tuple(part_shape))
    runs = _merged(extents)
    width = runs.pop()[0] if runs and runs[-1][1] == 1 else 1
    if len(runs) > 1:
        raise ValueError(f"the part {index} of a buffer of shape {shape} is not one set of equally spaced runs")
    height, pitch = runs[0] if runs else (1, width)
    return Region(offset * item_size, width * item_size, height, pitch * item_size, tuple(part_shape))


def _along_axis(index: int | slice, size: int) -> tuple[int, int, bool]:
    """First element, number of elements, and whether the axis stays."""
    if isinstance(index, slice):
        start, stop, step = index.indices(size)
        if step != 1:
            raise ValueError(f"a step of {step} in {index}; only whole runs can be copied")
        return start, max(0, stop - start), True
    if not -size <= index < size:
        raise IndexError(f"index {index} in a dimension of {size}")
    return index % size, 1, False


def _merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The axes of more than one element, those that together are equally spaced made one; (extent, stride) each."""
    merged: list[tuple[int, int]] = []
    for extent, stride in extents:
        if extent == 1:
            continue
        if merged and merged[-1][1] == extent * stride:
            merged[-1] = (merged[-1][0] * extent, stride)
        else:
            merged.append((extent, stride))
    return merged
