"""A trained fuser against the recorded fused caches of the reference implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from recorded_pairs import PAIRS
from safetensors.numpy import load_file

from c2c_export.check.trained.decoder import TrainedDecoder
from c2c_export.check.trained.fuser import TrainedFuser
from c2c_export.checkpoint import read_fuser
from c2c_export.errors import C2CError
from c2c_export.models import load_weights, read_config

GOLDEN = Path(__file__).parents[3] / "golden"
CAPACITY = 64
TOLERANCE = 1e-4
UNALIGNED = [name for name in PAIRS if not json.loads((GOLDEN / name / "case.json").read_text())["aligned"]]

Floats = NDArray[np.float32]


def caches_of(folder: Path, ids: NDArray[np.int64]) -> dict[str, Floats]:
    """A model's caches [1,H,C,D] of the prompt `ids`, with noise behind it."""
    rows = TrainedDecoder(load_weights(folder, read_config(folder)))
    after, _ = rows.extend(rows.no_rows(), ids, np.arange(len(ids)))
    random, caches = np.random.default_rng(0), {}
    for layer in range(rows.num_layers):
        for kind, tensors in (("key", after.keys), ("value", after.values)):
            cache = random.normal(size=(1, rows.num_heads, CAPACITY, rows.head_dim)).astype(np.float32)
            cache[:, :, : len(ids)] = tensors[layer].numpy()
            caches[f"{kind}.{layer}"] = cache
    return caches


@pytest.mark.parametrize("name", UNALIGNED)
def test_fused_caches_of_an_unaligned_prompt_are_the_recorded_ones(name: str) -> None:
    recorded = load_file(GOLDEN / name / "expected.safetensors")
    parallel = json.loads((GOLDEN / name / "case.json").read_text())["fusion_mode"] == "parallel"
    ids = recorded["0.receiver_ids"][0]
    count = len(ids) - 1  # the last token is the first step of decoding, and not fused
    receiver = caches_of(GOLDEN / name / "receiver", ids)
    unfused = {f"unfused_{layer}": cache[:, :, :count] for layer, cache in receiver.items()}
    for fuser, sharer in zip(
        sorted((GOLDEN / name).glob("fuser*")), sorted((GOLDEN / name).glob("sharer*")), strict=True
    ):
        trained = TrainedFuser(read_fuser(fuser))
        inputs = {f"past_{layer}": cache for layer, cache in receiver.items()}
        inputs |= {f"sharer_{layer}": cache for layer, cache in caches_of(sharer, ids).items()}
        inputs |= {"sharer_rows": np.arange(count), "receiver_rows": np.arange(count), "write_index": np.array([0])}
        outputs = trained.run({**inputs, **(unfused if parallel else {})})
        assert outputs.keys() == {f"{kind}.{link.receiver_layer}" for link, kind in trained.open_gates()}
        receiver |= outputs
    for cache, found in receiver.items():
        kind, layer = cache.split(".")
        expected = recorded[f"0.fused_{kind}.{layer}"]
        # the last token was computed here over unfused rows
        np.testing.assert_allclose(found[:, :, :count], expected[:, :, :count], rtol=0, atol=TOLERANCE, err_msg=cache)


def some_inputs(fuser: TrainedFuser, num_layers: int, rows: list[int]) -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(1)
    weights = next(iter(fuser.checkpoint.projectors.values()))
    inputs: dict[str, NDArray[np.generic]] = {
        "sharer_rows": np.array([4, 2, 3]),
        "receiver_rows": np.array(rows),
        "write_index": np.array(rows[:1]),
    }
    for layer in range(num_layers):
        for kind in ("key", "value"):
            for prefix, heads, size in (
                ("sharer", weights.source_num_heads, weights.source_dim),
                ("past", weights.target_num_heads, weights.target_dim),
            ):
                cache = random.normal(size=(1, heads, CAPACITY, size)).astype(np.float32)
                inputs[f"{prefix}_{kind}.{layer}"] = cache
    return inputs


@pytest.fixture(scope="module")
def trained() -> TrainedFuser:
    return TrainedFuser(read_fuser(GOLDEN / "qwen3_from_qwen2" / "fuser"))


def test_only_the_rows_of_the_section_change_and_inputs_do_not(trained: TrainedFuser) -> None:
    inputs = some_inputs(trained, 12, rows=[7, 8, 9])
    before = {name: array.copy() for name, array in inputs.items()}
    outputs = trained.run(inputs)
    for name, found in outputs.items():
        changed = (found != inputs[f"past_{name}"]).any(axis=(0, 1, 3))
        assert np.flatnonzero(changed).tolist() == [7, 8, 9]
    for name, array in before.items():
        np.testing.assert_array_equal(inputs[name], array)


def test_a_missing_cache_names_the_open_gate_that_reads_it(trained: TrainedFuser) -> None:
    link, kind = next(trained.open_gates())
    inputs = some_inputs(trained, 12, rows=[0, 1, 2])
    del inputs[f"past_{kind}.{link.receiver_layer}"]
    with pytest.raises(C2CError, match=f"has no input past_{kind}.{link.receiver_layer}, although projector"):
        trained.run(inputs)


def test_holding_other_weights_computes_with_them_and_leaves_the_fuser_as_it_was(trained: TrainedFuser) -> None:
    inputs = some_inputs(trained, 12, rows=[0, 1, 2])
    link, kind = next(trained.open_gates())
    before = trained.run(inputs)
    state = trained.checkpoint.projectors[link.projector].state
    zeros = {
        f"{link.projector}.{kind}_proj_out.{name}": 0 * state[f"{kind}_proj_out.{name}"].numpy()
        for name in ("weight", "bias")
    }
    outputs = trained.holding(zeros).run(inputs)
    name = f"{kind}.{link.receiver_layer}"
    np.testing.assert_array_equal(outputs[name], inputs[f"past_{name}"])
    assert np.abs(before[name] - inputs[f"past_{name}"]).max() > 1e-3
    for cache, found in trained.run(inputs).items():
        np.testing.assert_array_equal(found, before[cache])


def test_a_weight_that_the_fuser_does_not_have_is_refused(trained: TrainedFuser) -> None:
    with pytest.raises(ValueError, match="no such tensor"):
        trained.holding({"0.key_proj_in.weight": np.zeros((2, 2), dtype=np.float32)})
