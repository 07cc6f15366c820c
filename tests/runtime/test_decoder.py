"""A step that serves several slots in one run gives each what a step of its own gives, and touches nothing else."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tiny_models import CAPACITY, VOCAB, traced_model

from c2c_export.errors import C2CError
from engines.ort.engine import OrtCpuEngine
from engines.ort.lower import lower_decoder
from runtime.decoder import Decoder

NUM_SLOTS, NUM_STEPS = 4, 6
# As many real rows in each slot, and the gap in the positions before the first generated token.
LENGTHS, GAPS = (3, 11, 1, 7), (0, 2, 5, 1)

# Without windows, and with them: those graphs read the positions of all rows. As exported, and as the CPU runs them.
each_model = pytest.mark.parametrize(
    ("model", "lowered"),
    [
        *((name, False) for name in ("qwen3_wide_heads", "mistral_sliding", "gemma3")),
        *((name, True) for name in ("llama_llama3_rope", "mistral_sliding", "gemma3")),
    ],
)


@pytest.fixture
def engine(model: str, lowered: bool, tmp_path: Path) -> OrtCpuEngine:
    graph = ir.from_proto(traced_model(model).passed)
    if lowered:
        assert lower_decoder(graph)["fuse_attention"] > 0
    ir.save(graph, tmp_path / "receiver.onnx")
    return OrtCpuEngine(tmp_path / "receiver.onnx", 1)


def prefilled(engine: OrtCpuEngine) -> tuple[Decoder, NDArray[np.float32]]:
    """A decoder whose slots hold prompts of different lengths, and the prompts' logits [slots,V]."""
    decoder = Decoder(engine, NUM_SLOTS, CAPACITY)
    random = np.random.default_rng(0)
    logits = []
    for slot, length in enumerate(LENGTHS):
        decoder.run(slot, random.integers(0, VOCAB, length), np.arange(length), 0)
        logits.append(decoder.logits())
    return decoder, np.stack(logits)


def caches(decoder: Decoder) -> dict[str, NDArray[np.float32]]:
    """Every cache, whole: [slots,H,C,D]."""
    names = [spec.name for spec in decoder._engine.outputs if spec.name != "logits"]
    return {
        name: np.stack([decoder.pool.read_rows(name, slot, 0, CAPACITY) for slot in range(NUM_SLOTS)]) for name in names
    }


def steps() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Positions and rows of each step, for all slots."""
    lengths, gaps = np.array(LENGTHS), np.array(GAPS)
    for step in range(NUM_STEPS):
        yield lengths + gaps + step, lengths + step


@each_model
@pytest.mark.parametrize("served", [1, 3, NUM_SLOTS])
def test_every_slot_gets_the_tokens_and_logits_of_a_step_of_its_own(engine: OrtCpuEngine, served: int):
    together, prompt_logits = prefilled(engine)
    alone, _ = prefilled(engine)
    tokens = prompt_logits[:served].argmax(axis=-1)
    for positions, rows in steps():
        together.run_step(tokens, positions[:served], rows[:served])
        found = together.step_logits(served)
        expected = []
        for slot in range(served):
            alone.run(slot, tokens[slot : slot + 1], positions[slot : slot + 1], int(rows[slot]))
            expected.append(alone.logits())
        assert found.shape == (served, VOCAB)
        np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=1e-4)
        tokens = found.argmax(axis=-1)
        np.testing.assert_array_equal(tokens, np.stack(expected).argmax(axis=-1))
    for name, cache in caches(together).items():
        np.testing.assert_allclose(cache, caches(alone)[name], rtol=0, atol=1e-5, err_msg=name)


@each_model
def test_a_step_writes_one_row_of_the_served_slots_and_nothing_else(engine: OrtCpuEngine):
    decoder, _ = prefilled(engine)
    before, served = caches(decoder), 2
    decoder.run_step([5, 6], [LENGTHS[0], LENGTHS[1]], [LENGTHS[0], LENGTHS[1]])
    for name, cache in caches(decoder).items():
        changed = np.argwhere((cache != before[name]).any(axis=(1, 3))).tolist()
        assert changed == [[slot, LENGTHS[slot]] for slot in range(served)], name


@each_model
def test_a_slot_goes_on_by_itself_after_shared_steps(engine: OrtCpuEngine):
    decoder, _ = prefilled(engine)
    for positions, rows in steps():
        decoder.run_step(np.full(NUM_SLOTS, 3), positions, rows)
    slot, row = 1, LENGTHS[1] + NUM_STEPS
    decoder.run(slot, [9], [row + GAPS[1]], row)
    found = decoder.logits()
    decoder.run_step(np.full(NUM_SLOTS, 9), positions + 1, rows + 1)
    np.testing.assert_allclose(found, decoder.step_logits(NUM_SLOTS)[slot], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("model", "lowered"), [("qwen3_wide_heads", False)])
@pytest.mark.parametrize("served", [0, NUM_SLOTS + 1])
def test_a_step_for_other_slots_than_the_pools_is_refused(engine: OrtCpuEngine, served: int):
    decoder, _ = prefilled(engine)
    with pytest.raises(ValueError, match=f"slots 0 to {served - 1} of a pool of {NUM_SLOTS}"):
        decoder.run_step([0] * served, [0] * served, [0] * served)


@pytest.mark.parametrize(("model", "lowered"), [("llama_llama3_rope", True)])
@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_ids_that_the_model_does_not_embed_are_refused(engine: OrtCpuEngine, token: int):
    decoder = Decoder(engine, NUM_SLOTS, CAPACITY)
    with pytest.raises(C2CError, match=f"token id {token}: expected ids from 0 to {VOCAB - 1}"):
        decoder.run(0, [3, token, 4], [0, 1, 2], 0)
    with pytest.raises(C2CError, match=f"token id {token}: expected ids from 0 to {VOCAB - 1}"):
        decoder.run_step([3, token], [0, 0], [0, 0])
    decoder.run_step([0, VOCAB - 1], [0, 0], [0, 0])


@pytest.mark.parametrize(("model", "lowered"), [("llama_llama3_rope", True)])
def test_ids_of_a_model_without_logits_are_those_that_it_is_said_to_embed(engine: OrtCpuEngine):
    decoder = Decoder(engine, NUM_SLOTS, CAPACITY, vocab_size=9)
    with pytest.raises(C2CError, match="token id 9: expected ids from 0 to 8"):
        decoder.run(0, [8, 9], [0, 1], 0)
