"""What the runtime asks of a device: the order of copies, runs, marks and waits, and rows that never leave it.

The recording device really computes: it is the CPU's, and notes what is asked of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from c2c_export.bundle import Bundle, TensorSpec
from engines.base import Array, Binding, Buffer, Engine, Event, View, loaded, stored
from engines.ort.engine import CpuBuffer, CpuDevice, OrtCpuEngine
from runtime import C2CPipeline, Message
from runtime.cache import KVCachePool
from runtime.decoder import Decoder
from runtime.fuser import Fuser
from runtime.prefill import Prefill, Prefiller
from runtime.prompt import ModelTokens, Plan
from runtime.row_keeper import RowKeeper
from runtime.slot_state import SlotState, find_reuse

UNALIGNED, ALIGNED = "qwen3_from_qwen2", "llama_from_gemma3_aligned"
PARALLEL, SEQUENTIAL = "two_sharers_parallel", "two_sharers_sequential"
CHAT = [Message("user", "What is the capital of France?"), Message("assistant", "Paris."), Message("user", "Why?")]


def every(*names: str) -> Any:
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names])


every_kind = every(UNALIGNED, ALIGNED, PARALLEL, SEQUENTIAL)

Entry = tuple[str, str, Any]
"""Device, what was asked of it, and of which: a mark's number, a graph's name, or None."""


@dataclass
class Log:
    entries: list[Entry] = field(default_factory=list)
    num_marks: int = 0

    def next_mark(self) -> int:
        self.num_marks += 1
        return self.num_marks


class RecordedEvent(Event):
    def __init__(self, event: Event, number: int) -> None:
        self.event, self.number = event, number

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, RecordedEvent)
        return self.event.seconds_since(earlier.event)


class RecordingBuffer(CpuBuffer):
    def __init__(self, device: "RecordingDevice", shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(shape, dtype)
        self._owner = device

    def read_stored(self, *index: int | slice) -> Array:
        self._owner.note("read")
        return super().read_stored(*index)

    def write_stored(self, value: Array, *index: int | slice) -> None:
        self._owner.note("write")
        super().write_stored(value, *index)

    def copy_from(self, source: Buffer, *index: int | slice) -> None:
        self._owner.note("copy")
        super().copy_from(source, *index)


class RecordingDevice(CpuDevice):
    """The CPU, noting in a log shared with other devices what is asked of it."""

    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log

    def note(self, what: str, of: Any = None) -> None:
        self.log.entries.append((self.name, what, of))

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return RecordingBuffer(self, shape, dtype)

    def record(self) -> Event:
        number = self.log.next_mark()
        self.note("record", number)
        return RecordedEvent(super().record(), number)

    def wait(self, event: Event) -> None:
        assert isinstance(event, RecordedEvent)
        self.note("wait", event.number)
        super().wait(event.event)


class RecordingEngine(Engine):
    """An engine on a recording device, noting its runs under its graph's name."""

    def __init__(self, engine: Engine, device: RecordingDevice, graph: str) -> None:
        self._engine, self._graph, self._device = engine, graph, device
        self.inputs, self.outputs, self.device = engine.inputs, engine.outputs, device
        self.num_bindings = 0

    def run(self, binding: Binding) -> None:
        self._device.note("run", self._graph)
        self._engine.run(binding)

    def _bind(self, views: Mapping[str, View]) -> Binding:
        self.num_bindings += 1
        return self._engine.bind(views)


@dataclass
class Recorded:
    log: Log
    plan: Callable[..., Plan]
    receiver: Decoder
    prefiller: Prefiller
    numbers: list[int]

    def prefill(self, state: SlotState, plan: Plan) -> list[Entry]:
        self.log.entries.clear()
        self.prefiller.run(0, state, plan)
        return list(self.log.entries)


@pytest.fixture
def recorded(
    name: str, recorded_bundle: Callable[[str], Path], recorded_pipeline: Callable[[str], C2CPipeline]
) -> Recorded:
    """A pair with a device for each model, as on a GPU; fusers run on the receiver's."""
    bundle = Bundle.open(recorded_bundle(name))
    manifest, log = bundle.manifest, Log()
    numbers = list(range(len(manifest.sharers)))
    devices = {graph: RecordingDevice(graph, log) for graph in ("receiver", *(f"sharer{n}" for n in numbers))}

    def engine(graph: str, device: str) -> RecordingEngine:
        record = manifest.engines["ort-cpu-fp32"]
        path, weights_folder = bundle.file(record.graphs[graph]), bundle.weights_folder(record)
        return RecordingEngine(OrtCpuEngine(path, 1, devices[device], weights_folder), devices[device], graph)

    length = manifest.max_length
    receiver = Decoder(engine("receiver", "receiver"), 1, length)
    sharers = {n: Decoder(engine(f"sharer{n}", f"sharer{n}"), 1, length) for n in numbers}
    fusers = {n: Fuser(engine(f"fuser{n}", "receiver"), length) for n in numbers}
    return Recorded(log, recorded_pipeline(name).make_plan, receiver, Prefiller(receiver, sharers, fusers), numbers)


def ordered_before(entries: list[Entry], first: int, second: int) -> bool:
    """Whether the devices must finish entry `first` before they begin `second`: by queue order and by waits alone."""
    reached = {first}
    for index in range(first + 1, len(entries)):
        device, what, mark = entries[index]
        in_queue = any(entries[earlier][0] == device for earlier in reached)
        awaited = what == "wait" and any(entries[earlier][1:] == ("record", mark) for earlier in reached)
        if in_queue or awaited:
            reached.add(index)
    return second in reached


def runs_of(entries: list[Entry], graph: str) -> list[int]:
    return [index for index, entry in enumerate(entries) if entry[1:] == ("run", graph)]


@every_kind
def test_every_fuser_runs_after_its_sharer_and_the_receivers_rows(name: str, recorded: Recorded):
    entries = recorded.prefill(SlotState(), recorded.plan(CHAT, (), tuple(recorded.numbers)))
    for number in recorded.numbers:
        (sharer,) = runs_of(entries, f"sharer{number}")
        fusions = runs_of(entries, f"fuser{number}")
        assert fusions
        for fusion in fusions:
            assert ordered_before(entries, sharer, fusion)
            assert any(run < fusion and ordered_before(entries, run, fusion) for run in runs_of(entries, "receiver"))
        # The rows behind a fused section attend to the fused ones.
        assert ordered_before(entries, fusions[-1], runs_of(entries, "receiver")[-1])


@every_kind
def test_sharers_and_the_receivers_first_rows_may_be_computed_at_the_same_time(name: str, recorded: Recorded):
    entries = recorded.prefill(SlotState(), recorded.plan(CHAT, (), tuple(recorded.numbers)))
    first = runs_of(entries, "receiver")[0]
    sharers = [runs_of(entries, f"sharer{number}")[0] for number in recorded.numbers]
    for sharer in sharers:
        assert not ordered_before(entries, sharer, first)
        assert not ordered_before(entries, first, sharer)
        assert not any(ordered_before(entries, sharer, other) for other in sharers if other != sharer)
    # All sharers are queued before the host could wait for anything.
    assert not any(what == "read" for _, what, _ in entries[: max(*sharers, first)])


@every_kind
def test_a_sharer_writes_rows_only_when_former_fusions_have_read_them(name: str, recorded: Recorded):
    state, sharers = SlotState(), tuple(recorded.numbers)
    before = recorded.prefill(state, recorded.plan(CHAT, (), sharers))
    changed = [Message("user", "What is the tallest mountain?"), *CHAT[1:]]
    entries = [*before, *recorded.prefill(state, recorded.plan(changed, (), sharers))]
    for number in recorded.numbers:
        former = [index for index in runs_of(entries, f"fuser{number}") if index < len(before)]
        second = [index for index in runs_of(entries, f"sharer{number}") if index >= len(before)]
        assert former
        assert second
        for fusion in former:
            assert ordered_before(entries, fusion, second[0])


@every_kind
def test_a_prefill_reads_nothing_back_and_a_decode_step_one_row_of_logits(name: str, recorded: Recorded):
    plan = recorded.plan(CHAT, (), tuple(recorded.numbers))
    assert not [entry for entry in recorded.prefill(SlotState(), plan) if entry[1] == "read"]
    recorded.log.entries.clear()
    row = len(plan.receiver.ids)
    recorded.receiver.run(0, [5], [plan.num_positions], row)
    logits = recorded.receiver.logits()
    assert logits.ndim == 1
    kinds = [what for _, what, _ in recorded.log.entries]
    assert kinds == ["write"] * (len(kinds) - 2) + ["run", "read"]


@every(UNALIGNED)
def test_a_slots_decode_steps_are_bound_once(name: str, recorded: Recorded):
    plan = recorded.plan(CHAT, (), (0,))
    recorded.prefill(SlotState(), plan)
    engine = recorded.receiver._engine
    assert isinstance(engine, RecordingEngine)
    recorded.receiver.run(0, [5], [plan.num_positions], len(plan.receiver.ids))
    before, logits = engine.num_bindings, recorded.receiver.logits()
    for step in range(1, 4):
        recorded.receiver.run(0, [5], [plan.num_positions + step], len(plan.receiver.ids) + step)
    assert engine.num_bindings == before
    assert not np.array_equal(recorded.receiver.logits(), logits)
    recorded.receiver.run(0, [5, 6], [plan.num_positions, plan.num_positions + 1], len(plan.receiver.ids))
    assert engine.num_bindings == before + 1


@every(PARALLEL)
def test_rows_from_before_any_fuser_are_kept_on_the_device_before_the_first_fuser_runs(name: str, recorded: Recorded):
    entries = recorded.prefill(SlotState(), recorded.plan(CHAT, (), tuple(recorded.numbers)))
    copies = [index for index, entry in enumerate(entries) if entry[1] == "copy"]
    assert copies
    assert {entries[index][0] for index in copies} == {"receiver"}
    first, last = (runs_of(entries, f"fuser{number}") for number in (0, 1))
    for fusion in range(len(first)):
        start = last[fusion - 1] if fusion else 0
        for kept in (index for index in copies if start < index < last[fusion]):
            assert kept < first[fusion]


@every(PARALLEL)
def test_rows_that_are_put_back_are_written_before_a_fuser_reads_them(name: str, recorded: Recorded):
    prefiller = recorded.prefiller
    plan = recorded.plan(CHAT, (), tuple(recorded.numbers))
    reuse = find_reuse(SlotState(), prefiller.target(plan), prefiller.wide)
    first = Prefill(prefiller, 0, plan, reuse, keep_rows=True)
    while not first.done:
        first.advance()
    keeper = first.row_keeper()
    assert keeper is not None
    while not keeper.done:
        keeper.advance(1000)
    kept = keeper.kept_rows()

    fewer = recorded.plan(CHAT, (), (0,))  # all of the sharer's rows are there, and every section is fused anew
    reuse = find_reuse(kept.state, prefiller.target(fewer), prefiller.wide, kept.unfused)
    recorded.log.entries.clear()
    again = Prefill(prefiller, 0, fewer, reuse, begun_with=kept)
    while not again.done:
        again.advance()
    entries = list(recorded.log.entries)
    assert not runs_of(entries, "sharer0")
    written = [index for index, entry in enumerate(entries) if entry[:2] == ("sharer0", "write")]
    fusions = runs_of(entries, "fuser0")
    assert written
    assert fusions
    assert all(ordered_before(entries, index, fusions[0]) for index in written)


@every_kind
def test_a_device_for_each_model_gives_what_one_pipeline_gives(
    name: str, recorded: Recorded, recorded_pipeline: Callable[[str], C2CPipeline]
):
    plan = recorded.plan(CHAT, (), tuple(recorded.numbers))
    recorded.prefill(SlotState(), plan)
    pipe = recorded_pipeline(name)
    with pipe.prefill(CHAT) as session:
        np.testing.assert_array_equal(recorded.receiver.logits(), session.logits)
        for layer in range(pipe.bundle.manifest.receiver.num_layers):
            key, value = session.kv(layer)
            rows = len(plan.receiver.ids)
            np.testing.assert_array_equal(recorded.receiver.pool.read_rows(f"key.{layer}", 0, 0, rows), key)
            np.testing.assert_array_equal(recorded.receiver.pool.read_rows(f"value.{layer}", 0, 0, rows), value)


@every(UNALIGNED)
def test_timings_are_those_of_the_devices(name: str, recorded: Recorded):
    plan = recorded.plan(CHAT, (), (0,))
    timings = recorded.prefiller.run(0, SlotState(), plan).timings()
    assert min(timings.sharer_prefill, timings.receiver_prefill, timings.fuse) > 0
    alone = recorded.prefiller.run(0, SlotState(), recorded.plan(CHAT, (), ())).timings()
    assert (alone.sharer_prefill, alone.fuse) == (0, 0)
    assert alone.receiver_prefill > 0


# Buffers


@given(
    values=arrays.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)),
)
def test_bfloat16_is_rounded_as_ml_dtypes_does(values: Array):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(loaded(stored(values, "bfloat16"), "bfloat16"), expected)


def test_a_bfloat16_buffer_takes_two_bytes_and_is_read_as_float32():
    buffer = CpuDevice().allocate((2, 3), "bfloat16")
    buffer.write(np.array([1.0, -2.5, 3.140625], dtype=np.float32), 1)
    assert buffer.read(1).dtype == np.float32
    assert buffer.read().tolist() == [[0, 0, 0], [1.0, -2.5, 3.140625]]
    assert buffer.view(1).pointer - buffer.view(0).pointer == 6
    assert buffer.view().dtype == "bfloat16"


class Bfloat16Engine(Engine):
    """Of one cache in bfloat16, for one head of three numbers and eight rows; never run."""

    inputs = (TensorSpec(name="past_key.0", dtype="bfloat16", shape=("batch", 1, 8, 3)),)
    outputs = ()
    device = CpuDevice()

    def run(self, binding: Binding) -> None:
        raise AssertionError

    def _bind(self, views: Mapping[str, View]) -> Binding:
        raise AssertionError


def test_bfloat16_rows_are_kept_in_their_own_16_bits():
    """They were kept as float32, in twice the memory that had been reckoned with."""
    pool = KVCachePool(Bfloat16Engine(), 2)
    bits = np.array([[[0x3F80, 0xC020, 0x7FC1], [0, 0x8000, 0xFF80]]], dtype=np.uint16)  # NaN's, zero's, infinity's too
    pool.put_rows(0, 2, {"key.0": bits})
    keeper = RowKeeper(0, SlotState(ModelTokens(np.arange(4), np.arange(4))), pool, {}, {})
    while not keeper.done:
        keeper.advance(1)
    kept = keeper.kept_rows()
    assert kept.num_bytes == 4 * pool.row_bytes == 24
    pool.put_rows(1, 0, kept.receiver)
    np.testing.assert_array_equal(pool.take_rows(["key.0"], 1, 2, 4)["key.0"], bits)
    assert pool.read_rows("key.0", 1, 2, 3).tolist()[0][0][:2] == [1.0, -2.5]
    with pytest.raises(ValueError, match="float32 for a bfloat16 buffer"):
        pool.put_rows(0, 0, {"key.0": np.zeros((1, 1, 3), dtype=np.float32)})


@pytest.mark.parametrize(("last", "finite"), [(0x3F80, True), (0x7FC1, False), (0xFF80, False)])
def test_bfloat16_rows_that_are_not_finite_are_noticed(last: int, finite: bool):
    decoder = Decoder(Bfloat16Engine(), 1, 8)
    decoder.pool.put_rows(0, 3, {"key.0": np.array([[[0x3F80, last, 0x3F80]]], dtype=np.uint16)})
    state = SlotState(ModelTokens(np.arange(4), np.arange(4)))
    assert Prefiller(decoder, {}, {}).is_finite(0, state) == finite


def test_rows_are_copied_between_buffers_of_one_dtype_that_hold_them():
    device = CpuDevice()
    source = device.allocate((2, 3, 4, 2), "float32")
    source.write(np.arange(48, dtype=np.float32).reshape(2, 3, 4, 2), slice(None))
    target = device.allocate((20,), "float32")
    target.copy_from(source, 1, slice(None), slice(1, 3))
    assert target.read(slice(0, 12)).reshape(3, 2, 2).tolist() == source.read(1, slice(None), slice(1, 3)).tolist()
    assert not target.read(slice(12, 20)).any()
    with pytest.raises(ValueError, match="does not fit"):
        target.copy_from(source, 1)
    with pytest.raises(ValueError, match="float32 into a float16"):
        device.allocate((99,), "float16").copy_from(source, 0)
