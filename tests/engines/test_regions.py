"""A region names exactly the bytes that numpy's index selects, and refuses what is no region."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.regions import Region, region_of


def bytes_of(array: np.ndarray[Any, Any], region: Region) -> bytes:
    """What a two-dimensional copy of `region` brings."""
    memory = array.tobytes()
    starts = (region.offset + row * region.pitch for row in range(region.height))
    return b"".join(memory[start : start + region.width] for start in starts)


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int | slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    index: list[int | slice] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        bound = st.none() | st.integers(-size - 1, size + 1)
        index.append(draw(st.integers(-size, size - 1) | st.builds(slice, bound, bound)))
    return shape, tuple(index)


@given(part=parts(), dtype=st.sampled_from(["float32", "float16", "int64", "uint8"]))
def test_a_region_is_what_numpy_indexes_or_is_refused(part: Any, dtype: str):
    shape, index = part
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    expected = array[index]
    try:
        region = region_of(shape, index, array.itemsize)
    except ValueError:
        # Only where two axes are cut, so that the runs are not equally spaced.
        cut = [axis for axis, place in enumerate(index) if array[(slice(None),) * axis + (place,)].shape != shape]
        assert len(cut) >= 2
        return
    assert region.shape == expected.shape
    assert region.num_bytes == expected.nbytes
    assert bytes_of(array, region) == expected.tobytes()
    assert region.height <= 1 or region.pitch >= region.width  # CUDA's rule for pitched copies


@given(
    slots=st.integers(1, 4), heads=st.integers(1, 4), capacity=st.integers(1, 9), size=st.integers(1, 9), data=st.data()
)
def test_rows_of_a_slot_are_one_run_for_each_head(
    slots: int, heads: int, capacity: int, size: int, data: st.DataObject
):
    slot = data.draw(st.integers(0, slots - 1))
    start = data.draw(st.integers(0, capacity))
    stop = data.draw(st.integers(start, capacity))
    region = region_of((slots, heads, capacity, size), (slot, slice(None), slice(start, stop)), 2)
    assert region.shape == (heads, stop - start, size)
    if heads > 1 and start < stop < capacity:
        assert region == Region(
            offset=(slot * heads * capacity + start) * size * 2,
            width=(stop - start) * size * 2,
            height=heads,
            pitch=capacity * size * 2,
            shape=(heads, stop - start, size),
        )


def test_whole_buffers_and_slots_are_one_run():
    assert region_of((2, 3, 4), (), 4) == Region(0, 96, 1, 96, (2, 3, 4))
    assert region_of((2, 3, 4), (1,), 4) == Region(48, 48, 1, 48, (3, 4))
    assert region_of((2, 3, 4), (1, 2, 3), 4) == Region(92, 4, 1, 4, ())


def test_wrong_indices_are_refused():
    for index in ((2,), (-3,), (0, 0, 0, 0)):
        with pytest.raises(IndexError):
            region_of((2, 3, 4), index, 4)
    for index in ((slice(None, None, 2),), (slice(0, 1), slice(0, 2), slice(0, 2)), (slice(None), 0, slice(0, 2))):
        if index == (slice(None), 0, slice(0, 2)):
            assert region_of((2, 3, 4), index, 4) == Region(0, 8, 2, 48, (2, 2))
        elif index[0] == slice(0, 1):
            assert region_of((2, 3, 4), index, 4) == Region(0, 8, 2, 16, (1, 2, 2))
        else:
            with pytest.raises(ValueError, match="step"):
                region_of((2, 3, 4), index, 4)
    with pytest.raises(ValueError, match="equally spaced"):
        region_of((2, 3, 4), (slice(None), slice(0, 2), slice(0, 2)), 4)
