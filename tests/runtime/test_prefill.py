"""What a further turn computes: the rows that cannot be reused and no others, counted at the engines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from recorded_pairs import ALIGNED, CLOSING_PADDING, SEQUENTIAL, UNALIGNED, PipelineOf, every

from c2c_export.bundle import Bundle
from engines.base import Binding, Engine, View
from engines.ort.engine import OrtBinding, OrtCpuEngine
from runtime import Message
from runtime.decoder import Decoder
from runtime.fuser import Fuser
from runtime.prefill import Prefiller
from runtime.prompt import ModelTokens, Plan
from runtime.slot_state import SlotState

CHAT = [
    Message("system", "Be brief."),
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris, it is."),
    Message("user", "And of Spain?"),
]

every_kind = every(UNALIGNED, CLOSING_PADDING, ALIGNED, SEQUENTIAL)
every_aligned = every(CLOSING_PADDING, ALIGNED)


class CountingEngine(Engine):
    """The engine itself, noting how many tokens (or, of a fuser, rows) each run is given."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.inputs, self.outputs, self.device = engine.inputs, engine.outputs, engine.device
        self.counts: list[int] = []

    def run(self, binding: Binding) -> None:
        assert isinstance(binding, OrtBinding)
        rows = binding.views.get("input_ids") or binding.views["receiver_rows"]
        self.counts.append(rows.shape[-1])
        self._engine.run(binding)

    def _bind(self, views: Mapping[str, View]) -> Binding:
        return self._engine.bind(views)


@dataclass
class Counted:
    """A pair's engines over two slots, and one conversation in the first of them."""

    bundle: Bundle
    plan: Callable[..., Plan]
    engines: dict[str, CountingEngine]
    receiver: Decoder
    prefiller: Prefiller
    state: SlotState

    @property
    def sharers(self) -> list[int]:
        return list(range(len(self.bundle.manifest.sharers)))

    def run(self, plan: Plan) -> dict[str, list[int]]:
        """Bring the conversation to `plan`; what each engine was given."""
        for engine in self.engines.values():
            engine.counts.clear()
        self.prefiller.run(0, self.state, plan)
        return {name: list(engine.counts) for name, engine in self.engines.items()}

    def assert_holds(self, plan: Plan) -> None:
        """The conversation holds what a fresh slot does."""
        logits = self.receiver.logits()
        self.prefiller.run(1, SlotState(), plan)
        np.testing.assert_allclose(logits, self.receiver.logits(), rtol=0, atol=1e-3)
        num_rows = len(plan.receiver.ids)
        for layer in range(self.bundle.manifest.receiver.num_layers):
            for cache in (f"key.{layer}", f"value.{layer}"):
                found, expected = (self.receiver.pool.read_rows(cache, slot, 0, num_rows) for slot in (0, 1))
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=cache)


@pytest.fixture
def counted(name: str, recorded_bundle: Callable[[str], Path], recorded_pipeline: PipelineOf) -> Counted:
    bundle = Bundle.open(recorded_bundle(name))
    record = bundle.manifest.engines["ort-cpu-fp32"]
    engines = {
        graph: CountingEngine(OrtCpuEngine(bundle.file(path), 1, weights_folder=bundle.weights_folder(record)))
        for graph, path in record.graphs.items()
    }
    length = bundle.manifest.max_length
    receiver = Decoder(engines["receiver"], 2, length)
    numbers = range(len(bundle.manifest.sharers))
    prefiller = Prefiller(
        receiver,
        {number: Decoder(engines[f"sharer{number}"], 2, length) for number in numbers},
        {number: Fuser(engines[f"fuser{number}"], length) for number in numbers},
    )
    return Counted(bundle, recorded_pipeline(name).make_plan, engines, receiver, prefiller, SlotState())


def num_common(old: ModelTokens, new: ModelTokens) -> int:
    pairs = zip(
        zip(old.ids.tolist(), old.position_ids.tolist(), strict=True),
        zip(new.ids.tolist(), new.position_ids.tolist(), strict=True),
        strict=False,
    )
    count = 0
    for ours, theirs in pairs:
        if ours != theirs:
            break
        count += 1
    return count


def up_to_the_last_fused(plan: Plan, sharer: int) -> ModelTokens:
    stop = max(section.stop for section in plan.sections if section.fused)
    tokens = plan.sharers[sharer]
    wanted = tokens.position_ids < stop
    return ModelTokens(tokens.ids[wanted], tokens.position_ids[wanted])


def num_closing(plan: Plan) -> int:
    return int(plan.closing_padding_id is not None)


def lengths_of_fused(plan: Plan) -> list[int]:
    return [section.stop - section.start for section in plan.sections if section.fused]


@every_kind
def test_a_fresh_prompt_computes_every_real_token_once_and_no_padding(name: str, counted: Counted):
    plan = counted.plan(CHAT, (), tuple(counted.sharers))
    counts = counted.run(plan)
    assert sum(counts["receiver"]) == len(plan.receiver.ids) + num_closing(plan)
    for sharer in counted.sharers:
        # What follows the last fused token is read by nobody.
        assert counts[f"sharer{sharer}"] == [len(up_to_the_last_fused(plan, sharer).ids)]
        assert counts[f"fuser{sharer}"] == lengths_of_fused(plan)


@every_aligned
def test_a_further_turn_computes_the_new_rows_only(name: str, counted: Counted):
    first, second = counted.plan(CHAT[:2], (), (0,)), counted.plan(CHAT, (), (0,))
    counted.run(first)
    counts = counted.run(second)
    kept = num_common(first.receiver, second.receiver)
    assert kept > len(first.receiver.ids) - 10
    assert sum(counts["receiver"]) == len(second.receiver.ids) - kept + num_closing(second)
    old, new = up_to_the_last_fused(first, 0), up_to_the_last_fused(second, 0)
    assert counts["sharer0"] == [len(new.ids) - num_common(old, new)]
    assert counts["fuser0"] == lengths_of_fused(second)[2:]
    counted.assert_holds(second)


@every(UNALIGNED, SEQUENTIAL)
def test_a_further_turn_of_an_unaligned_pair_keeps_the_sharers_rows(name: str, counted: Counted):
    # The whole prompt is one fused section, whose receiver rows attend to each other unfused: all are computed again.
    sharers = tuple(counted.sharers)
    first, second = counted.plan(CHAT[:2], (), sharers), counted.plan(CHAT, (), sharers)
    counted.run(first)
    counts = counted.run(second)
    assert sum(counts["receiver"]) == len(second.receiver.ids)
    for sharer in sharers:
        old, new = up_to_the_last_fused(first, sharer), up_to_the_last_fused(second, sharer)
        assert num_common(old, new) == len(old.ids)
        assert counts[f"sharer{sharer}"] == [len(new.ids) - len(old.ids)]
        assert counts[f"fuser{sharer}"] == lengths_of_fused(second)
    counted.assert_holds(second)


@every_kind
def test_a_further_turn_of_the_receiver_alone_computes_the_new_rows_only(name: str, counted: Counted):
    first, second = counted.plan(CHAT[:2], (), ()), counted.plan(CHAT, (), ())
    counted.run(first)
    counts = counted.run(second)
    assert counts["receiver"] == [len(second.receiver.ids) - num_common(first.receiver, second.receiver)]
    assert not any(counts[graph] for graph in counts if graph != "receiver")
    counted.assert_holds(second)


@every_kind
def test_generated_rows_are_computed_again_as_a_prompt_rounds_otherwise(name: str, counted: Counted):
    ids = [5, 77, 300, 12, 511, 8]
    first, second = counted.plan(None, ids, ()), counted.plan(None, [*ids, 40, 41, 42, 7], ())
    counted.run(first)
    for index, token in enumerate((40, 41)):
        counted.receiver.run(0, [token], [len(ids) + index], len(ids) + index)
        counted.state.append(token, len(ids) + index)
    assert counted.run(second)["receiver"] == [4]
    counted.assert_holds(second)
    assert counted.run(counted.plan(None, [*second.receiver.ids.tolist(), 9, 10], ()))["receiver"] == [2]


@every_kind
def test_the_same_prompt_again_computes_as_little_as_its_logits_need(name: str, counted: Counted):
    plan = counted.plan(CHAT, (), tuple(counted.sharers))
    counted.run(plan)
    counts = counted.run(plan)
    last_stop = [section.stop for section in plan.sections if section.fused][-1]
    tail = int(np.count_nonzero(plan.receiver.position_ids >= last_stop)) + num_closing(plan)
    # A single token of a longer run would round otherwise than it did in that run.
    assert counts["receiver"] == [min(2, tail)]
    assert not any(counts[graph] for graph in counts if graph != "receiver")
    counted.assert_holds(plan)


@every_aligned
def test_a_change_in_the_middle_reuses_what_stands_before_it(name: str, counted: Counted):
    changed = [CHAT[0], Message("user", "What is the capital of Peru?"), *CHAT[2:]]
    first, second = counted.plan(CHAT, (), (0,)), counted.plan(changed, (), (0,))
    counted.run(first)
    counts = counted.run(second)
    # The changed message is fused as a whole, so it is computed again from its first token.
    start = [section.start for section in second.sections if section.fused][1]
    kept = int(np.count_nonzero(second.receiver.position_ids < start))
    assert kept < num_common(first.receiver, second.receiver)
    assert sum(counts["receiver"]) == len(second.receiver.ids) - kept + num_closing(second)
    assert counts["fuser0"] == lengths_of_fused(second)[1:]
    old, new = up_to_the_last_fused(first, 0), up_to_the_last_fused(second, 0)
    assert counts["sharer0"] == [len(new.ids) - num_common(old, new)]
    counted.assert_holds(second)


@every_kind
@pytest.mark.parametrize("shorter", [1, 2, 3])
def test_going_back_to_a_shorter_chat_is_exact(name: str, shorter: int, counted: Counted):
    # The rows behind it hold what was there before; nothing may attend to them.
    sharers = tuple(counted.sharers)
    counted.run(counted.plan(CHAT, (), sharers))
    plan = counted.plan(CHAT[:shorter], (), sharers)
    counted.run(plan)
    counted.assert_holds(plan)
    counted.run(counted.plan(CHAT, (), ()))
    counted.assert_holds(counted.plan(CHAT, (), ()))
    counted.run(plan)
    counted.assert_holds(plan)


def test_generated_rows_are_recorded_without_copying_those_before_each_time():
    prompt = ModelTokens(np.arange(100), 2 * np.arange(100))
    state = SlotState(prompt)
    arrays, kept = set(), []
    for token in range(1000):
        state.append(token, 200 + token)
        arrays.add(id(state.receiver.ids.base))
        kept.append(state.receiver)
    assert len(arrays) <= 5  # 200, 400, 800, 1600 rows
    np.testing.assert_array_equal(state.receiver.ids, [*range(100), *range(1000)])
    np.testing.assert_array_equal(state.receiver.position_ids, [*range(0, 200, 2), *range(200, 1200)])
    np.testing.assert_array_equal(kept[10].ids, [*range(100), *range(11)])
    np.testing.assert_array_equal(prompt.ids, np.arange(100))


def test_rows_after_another_prompt_do_not_write_over_those_kept_from_before():
    state = SlotState(ModelTokens(np.arange(3), np.arange(3)))
    state.append(7, 3)
    before = state.receiver
    state.receiver = ModelTokens(before.ids[:3], before.position_ids[:3])
    state.append(9, 3)
    assert (before.ids.tolist(), state.receiver.ids.tolist()) == ([0, 1, 2, 7], [0, 1, 2, 9])
