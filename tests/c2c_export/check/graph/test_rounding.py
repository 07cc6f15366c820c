"""What a format rounds away is no misfit, whatever the weights; what another block or scale gives is one."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from c2c_export.check.graph.blocks import IntegerBlocks
from c2c_export.check.graph.rounding import Misfits, find_misfits
from c2c_export.check.graph.stored import Stored
from engines.ort.blocks import Blocks, quantize, quantize_with_offsets
from engines.quantize import quantize_blocks, quantize_columns

Floats = NDArray[np.float32]


def weights(seed: int, shape: tuple[int, int], spread: float, offset: float) -> Floats:
    """[N,K] with a heavy tail, so that quantisers clip, and perhaps all of one sign."""
    random = np.random.default_rng(seed)
    return (spread * random.standard_t(3, shape) + offset).astype(np.float32)


def for_cpu(blocks: Blocks, num_columns: int) -> Stored:
    integers = blocks.values.reshape(len(blocks.values), -1)[:, :num_columns].astype(np.int16)
    zero_points = blocks.zero_points.astype(np.int16)
    return stored(IntegerBlocks(blocks.bits, 32, integers, blocks.scales, zero_points, 0, has_zero_points=True))


def stored(blocks: IntegerBlocks) -> Stored:
    return Stored(blocks.numbers(), ir.DataType.FLOAT, blocks)


distributions = st.tuples(
    st.integers(0, 10_000), st.sampled_from([1e-6, 0.02, 1.0, 300.0]), st.sampled_from([0.0, 0.01, -5.0, 1e4])
)


@given(distributions, st.sampled_from([4, 8]), st.sampled_from([32, 64, 83]))
def test_blocks_for_the_cpu_are_no_misfits(distribution: tuple[int, float, float], bits: int, width: int) -> None:
    seed, spread, offset = distribution
    weight = weights(seed, (5, width), spread, offset)
    assert find_misfits(for_cpu(quantize(weight.T, bits), width), weight) is None  # type: ignore[arg-type]


@given(distributions)
def test_blocks_with_offsets_are_no_misfits(distribution: tuple[int, float, float]) -> None:
    seed, spread, offset = distribution
    weight = weights(seed, (4, 40 * 32), spread, offset)
    blocks, offsets = quantize_with_offsets(weight.T)
    extended = for_cpu(blocks, weight.shape[1]).blocks
    assert extended is not None
    rounded = quantize(offsets, 4).dequantized()[: len(offsets)].T
    assert find_misfits(stored(replace(extended, offsets=np.ascontiguousarray(rounded))), weight) is None


@given(distributions, st.sampled_from(["int8", "int4"]))
def test_blocks_for_gpus_are_no_misfits(distribution: tuple[int, float, float], precision: str) -> None:
    seed, spread, offset = distribution
    weight = weights(seed, (6, 128), spread, offset)
    quantized = quantize_columns(weight.T) if precision == "int8" else quantize_blocks(weight.T, 64)
    bits, block_size = (8, 128) if precision == "int8" else (4, 64)
    scales = np.atleast_2d(quantized.scales).T
    integers = quantized.values.T.astype(np.int16)
    zeros = np.zeros(scales.shape, dtype=np.int16)
    blocks = IntegerBlocks(bits, block_size, integers, scales, zeros, -(2 ** (bits - 1)), has_zero_points=False)
    assert find_misfits(stored(blocks), weight) is None


@pytest.mark.parametrize(("dtype", "onnx_type"), [("float16", ir.DataType.FLOAT16), ("bfloat16", ir.DataType.BFLOAT16)])
def test_rounding_to_nearest_is_no_misfit_and_to_the_next_but_one_is(dtype: str, onnx_type: ir.DataType) -> None:
    weight = np.concatenate([weights(0, (40, 50), spread, 0.0) for spread in (1e-7, 1e-4, 1.0, 50.0)])
    rounded = torch.from_numpy(weight).to(getattr(torch, dtype))
    assert find_misfits(Stored(rounded.float().numpy(), onnx_type), weight) is None
    moved = torch.nextafter(rounded, torch.full_like(rounded, float("inf"))).float().numpy()
    found = find_misfits(Stored(moved, onnx_type), weight)
    assert found is not None
    assert found.num_wrong > 0.9 * weight.size


def test_float32_must_be_equal() -> None:
    weight = weights(0, (3, 8), 1.0, 0.0)
    changed = weight.copy()
    changed[2, 5] = np.nextafter(weight[2, 5], np.float32(np.inf))
    found = find_misfits(Stored(changed, ir.DataType.FLOAT), weight)
    assert found == Misfits(1, 24, 2, 5, 1, float(changed[2, 5]), float(weight[2, 5]), only_last=False)


def test_what_is_not_a_number_is_a_misfit() -> None:
    weight = weights(0, (2, 4), 1.0, 0.0)
    changed = weight.copy()
    changed[1, 1] = np.nan
    for dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        assert find_misfits(Stored(changed, dtype), weight) is not None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("what", ["scale", "zero point", "integers of the neighbour", "scale 0", "sign"])
def test_a_block_that_is_dequantised_wrongly_is_the_misfit(bits: int, what: str) -> None:
    weight = weights(1, (6, 96), 0.02, 0.0)
    right = for_cpu(quantize(weight.T, bits), 96).blocks  # type: ignore[arg-type]
    assert right is not None
    integers, scales, zero_points = right.integers.copy(), right.scales.copy(), right.zero_points.copy()
    if what == "scale":
        scales[4, 2] *= 1.15
    elif what == "zero point":
        zero_points[4, 2] += 1
    elif what == "integers of the neighbour":
        integers[4, 64:] = integers[4, 32:64]
    elif what == "scale 0":
        scales[4, 2] = 0
    else:
        scales[4, 2] *= -1
    spoilt = replace(right, integers=integers, scales=scales, zero_points=zero_points)
    found = find_misfits(stored(spoilt), weight)
    assert found is not None
    assert (found.num_wrong, found.row, found.start, found.width, found.only_last) == (1, 4, 64, 32, True)
    assert found.describe().endswith("; all of them are the last of their row")
