"""What a request gets of a decode step does not depend on how many requests the step serves: not by one bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from c2c_export.bundle import read_manifest
from engines.lowering import lower
from engines.ort.engine import OrtCpuEngine
from runtime.decoder import Decoder

CAPACITY = 256
LENGTHS = (40, 7, 33, 1, 40, 90, 12, 40)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(
    "pair",
    [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("qwen3_from_qwen2", "gates_closed")],
)
def test_a_slot_gets_the_same_bits_from_a_step_of_any_number_of_slots(
    pair: str, precision: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    bundle, path = recorded_bundle(pair), tmp_path / "receiver.onnx"
    vocab_size = read_manifest(bundle).receiver.vocab_size
    lowered = lower(bundle / "graphs" / "receiver.onnx", "ort-cpu", precision, is_fuser=False).model
    ir.save(lowered, path, external_data=f"{path.name}.data")
    decoder = Decoder(OrtCpuEngine(path, 2), len(LENGTHS), CAPACITY)
    random = np.random.default_rng(0)
    for slot, length in enumerate(LENGTHS):
        decoder.run(slot, random.integers(0, vocab_size, length), np.arange(length), 0)
    tokens, rows = random.integers(0, vocab_size, len(LENGTHS)), np.array(LENGTHS)
    caches = [spec.name.removeprefix("past_") for spec in decoder._engine.inputs if spec.name.startswith("past_")]

    def written(num_slots: int) -> list[np.ndarray]:
        return [
            decoder.pool.read_rows(name, slot, LENGTHS[slot], LENGTHS[slot] + 1)
            for name in caches
            for slot in range(num_slots)
        ]

    alone = []
    for slot in range(len(LENGTHS)):
        decoder.run(slot, tokens[slot : slot + 1], rows[slot : slot + 1], LENGTHS[slot])
        alone.append(decoder.logits())
    for num_slots in (1, 2, 3, 5, 8):
        expected = written(num_slots)
        decoder.run_step(tokens[:num_slots], rows[:num_slots], rows[:num_slots])
        np.testing.assert_array_equal(decoder.step_logits(num_slots), np.stack(alone[:num_slots]))
        np.testing.assert_array_equal(written(num_slots), expected)
