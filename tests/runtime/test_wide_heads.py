"""Heads wider than 128: what a slot or the prefix cache holds of former prompts is gone on from, bit for bit.

A model as Gemma's, with a window, is receiver and sharer at once; in place of a fuser a sum of both caches.
"""

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tiny_models import CONFIGS, VOCAB, build_model

from c2c_export.passes import RECEIVER_PASSES
from c2c_export.trace.decoder import trace_decoder
from engines.ort.engine import OrtCpuEngine
from engines.ort.lower import lower_decoder
from runtime.cache import KVCachePool
from runtime.decoder import Decoder
from runtime.fuser import Fuser
from runtime.prefill import Prefill, Prefiller
from runtime.prefix_cache import PrefixCache
from runtime.prompt import ModelTokens, Plan, Section
from runtime.slot_state import SlotState

CAPACITY = 512
LENGTHS = (*range(2, 30), 62, 63, 64, 65, 66, 97, 126, 127, 128, 129, 130, 161, 192, 193, 194, 200, 255, 256, 257, 321)


class Sum(Fuser):
    """Adds the sharer's first keys to the receiver's, in host memory."""

    def __init__(self) -> None:
        pass

    @property
    def changed(self) -> tuple[str, ...]:
        return ("key.0",)

    def keep_unfused(self, receiver: KVCachePool, slot: int, rows: range) -> None:
        pass

    def run(
        self,
        receiver: KVCachePool,
        sharer: KVCachePool,
        slot: int,
        receiver_rows: range,
        sharer_rows: NDArray[np.int64],
    ) -> None:
        read = sharer.read_rows("key.0", slot, 0, int(sharer_rows.max()) + 1)[:, sharer_rows]
        own = receiver.read_rows("key.0", slot, receiver_rows.start, receiver_rows.stop)
        receiver.put_rows(slot, receiver_rows.start, {"key.0": own + read})


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CONFIGS["gemma3"]()
    config.head_dim, config.sliding_window, config.max_position_embeddings = 256, 100, CAPACITY
    decoder = trace_decoder(build_model(config), CAPACITY)
    for _, apply in RECEIVER_PASSES:
        apply(decoder)
    assert lower_decoder(decoder)["fuse_attention"] > 0
    path = tmp_path_factory.mktemp("wide") / "decoder.onnx"
    ir.save(decoder, path)
    return path


@pytest.fixture
def prefiller(graph: Path) -> Prefiller:
    receiver, sharer = (Decoder(OrtCpuEngine(graph, 1), 2, CAPACITY) for _ in range(2))
    return Prefiller(receiver, {0: sharer}, {0: Sum()})


def plan_of(ids: NDArray[np.int64], fused: list[tuple[int, int]], closing: bool = False) -> Plan:
    """`ids` at gapped positions; `fused` are ranges of rows that rise, with others between them."""
    positions = np.arange(len(ids)) + np.searchsorted([40, 150], np.arange(len(ids)), side="right")
    tokens = ModelTokens(ids, positions)
    num_positions = int(positions[-1]) + 1 + closing
    cuts = sorted({0, *itertools.chain.from_iterable(fused), len(ids)})
    sections = []
    for start, stop in itertools.pairwise(cuts):
        last = num_positions if stop == len(ids) else int(positions[stop])
        sections.append(Section(int(positions[start]), last, (start, stop) in fused))
    return Plan(tuple(sections), tokens, {0: tokens} if fused else {}, num_positions, 0 if closing else None)


def rows_of(prefiller: Prefiller, slot: int, num_rows: int) -> list[NDArray[np.float32]]:
    decoders = (prefiller.receiver, *prefiller.sharers.values())
    return [decoder.pool.read_rows(name, slot, 0, num_rows) for decoder in decoders for name in decoder.pool.names]


def assert_as_fresh(prefiller: Prefiller, plan: Plan) -> None:
    """Slot 0 holds, and the receiver's logits are, what a fresh slot's are."""
    logits = prefiller.receiver.logits()
    target = prefiller.target(plan)
    num_read = max((len(tokens.ids) for tokens in target.sharers.values()), default=0)
    found = rows_of(prefiller, 0, target.num_rows)
    prefiller.run(1, SlotState(), plan)
    np.testing.assert_array_equal(logits, prefiller.receiver.logits())
    for index, expected in enumerate(rows_of(prefiller, 1, target.num_rows)):
        num_rows = target.num_rows if index < len(prefiller.receiver.pool.names) else num_read
        np.testing.assert_array_equal(found[index][:, :num_rows], expected[:, :num_rows])


def random_plans(seed: int, count: int) -> list[Plan]:
    """Prompts of which many begin alike; their sections stop wherever."""
    rng = np.random.default_rng(seed)
    base = rng.integers(2, VOCAB, CAPACITY)
    base_cuts = [0, *sorted(rng.choice(LENGTHS, 3, replace=False).tolist())]
    plans = []
    for _ in range(count):
        num_rows = int(rng.choice(LENGTHS)) + int(rng.choice(LENGTHS[:44]))
        ids = base.copy()
        ids[int(rng.integers(1, num_rows + 1)) :] = rng.integers(2, VOCAB)
        cuts = [cut for cut in base_cuts if cut < num_rows]
        fused = [pair for index, pair in enumerate(itertools.pairwise(cuts)) if index % 2 == 0]
        if rng.random() < 0.3:
            fused = []
        plans.append(plan_of(ids[:num_rows], fused, closing=bool(rng.random() < 0.3)))
    return plans


@pytest.mark.parametrize("seed", range(6))
def test_a_slot_that_goes_on_holds_what_a_fresh_one_does(seed: int, prefiller: Prefiller):
    state, reused = SlotState(), 0
    for plan in random_plans(seed, 12):
        reused += prefiller.run(0, state, plan).num_reused_rows
        assert_as_fresh(prefiller, plan)
    assert reused


@pytest.mark.parametrize("seed", range(6, 12))
def test_a_prompt_that_begins_with_kept_rows_is_what_it_is_in_a_fresh_slot(seed: int, prefiller: Prefiller):
    cache, reused = PrefixCache(prefiller, 2**30), 0
    for plan in random_plans(seed, 12):
        reused += serve(prefiller, cache, plan)
        assert_as_fresh(prefiller, plan)
    assert reused
    assert len(cache)


def serve(prefiller: Prefiller, cache: PrefixCache, plan: Plan) -> int:
    """Prefill a prompt in slot 0 and keep its rows, as a scheduler does; how many were there."""
    target = prefiller.target(plan)
    kept, reuse = cache.find(target)
    num_bytes = cache.set_aside(target, reuse)
    prefill = Prefill(prefiller, 0, plan, reuse, begun_with=kept, keep_rows=bool(num_bytes))
    while not prefill.done:
        prefill.advance()
    keeper = prefill.row_keeper()
    if keeper is not None:
        while not keeper.done:
            keeper.advance(1000)
        cache.give_back(num_bytes)
        cache.add(keeper.kept_rows())
    return reuse.num_rows


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("num_rows", [200, 201, 209])
def test_the_same_prompt_again_is_reused_and_kept_once_or_not_at_all(num_rows: int, fused: bool, prefiller: Prefiller):
    """It was kept every time, with rows that were never used, until no other prompt had room."""
    cache = PrefixCache(prefiller, 2**30)
    plan = plan_of(np.arange(num_rows) % VOCAB, [(0, 60)] if fused else [])
    first = serve(prefiller, cache, plan)
    kept = list(cache._kept)
    others = [serve(prefiller, cache, plan) for _ in range(3)]
    assert not first
    # A last token that may be a block of attention by itself is not reused, nor are those of its run.
    alone = (num_rows - 60 * fused) % 16 == 1
    assert others == [60 * fused if alone else num_rows - 2] * 3
    assert len(kept) == (not alone or fused)
    assert list(cache._kept) == kept, "copied once"


def test_rows_of_generated_tokens_are_computed_again(prefiller: Prefiller):
    ids, state = np.arange(110) % VOCAB, SlotState()
    first, further = plan_of(ids[:70], []), plan_of(ids, [])
    prefiller.run(0, state, first)
    for row in range(70, 105):
        token_id, position = int(ids[row]), int(further.receiver.position_ids[row])
        prefiller.receiver.run(0, [token_id], [position], row)
        state.append(token_id, position)
    assert prefiller.run(0, state, further).num_reused_rows == 70
    assert_as_fresh(prefiller, further)
