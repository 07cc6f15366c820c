"""ONNX Runtime's engine: caches are updated in the memory that is bound, and in no other row, slot or place."""

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from c2c_export.bundle import Bundle
from c2c_export.errors import C2CError
from engines.base import View
from engines.ort.engine import CpuDevice, OrtCpuEngine
from runtime import C2CPipeline, Message
from runtime.cache import KVCachePool
from runtime.decoder import Decoder
from runtime.fuser import Fuser
from runtime.prefill import Prefiller
from runtime.prompt import Plan
from runtime.slot_state import SlotState

UNALIGNED, CLOSING_PADDING, ALIGNED = "qwen3_from_qwen2", "qwen3_from_llama_aligned", "llama_from_gemma3_aligned"
CHAT = [Message("user", "What is the capital of France?"), Message("assistant", "Paris."), Message("user", "Why?")]
NUM_SLOTS = 3

Array = np.ndarray[Any, Any]


def every(*names: str) -> Any:
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names])


every_kind = every(UNALIGNED, CLOSING_PADDING, ALIGNED, "two_sharers_parallel", "two_sharers_sequential")
unaligned = every(UNALIGNED)


def memory_at(view: View) -> Array:
    """The memory that `view` points to, itself."""
    assert view.dtype == "float32"
    count = int(np.prod(view.shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(view.pointer)).reshape(view.shape)


@dataclass
class Engines:
    """A pair's engines, and the names of the caches in their pools."""

    plan: Plan
    pools: dict[str, KVCachePool]
    caches: dict[str, list[str]]
    receiver: Decoder
    prefiller: Prefiller

    def views(self) -> dict[tuple[str, str, int], View]:
        return {
            (model, cache, slot): pool.view(cache, slot)
            for model, pool in self.pools.items()
            for cache in self.caches[model]
            for slot in range(NUM_SLOTS)
        }

    def fill_with_random_numbers(self) -> None:
        generator = np.random.default_rng(0)
        for view in self.views().values():
            memory = memory_at(view)
            memory[:] = generator.normal(0, 100, memory.shape)

    def contents(self) -> dict[tuple[str, str, int], Array]:
        return {place: memory_at(view).copy() for place, view in self.views().items()}

    def prefill_and_decode(self, slot: int, num_steps: int) -> Array:
        """Logits of the prompt and of `num_steps` steps after it: [num_steps + 1, V]."""
        self.prefiller.run(slot, SlotState(), self.plan)
        logits = [self.receiver.logits()]
        for step in range(num_steps):
            row = len(self.plan.receiver.ids) + step
            self.receiver.run(slot, [int(logits[-1].argmax())], [self.plan.num_positions + step], row)
            logits.append(self.receiver.logits())
        return np.stack(logits)


def load(name: str, folder: Path, pipe: C2CPipeline) -> Engines:
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    numbers = range(len(manifest.sharers))

    def engine(graph: str) -> OrtCpuEngine:
        record = manifest.engines["ort-cpu-fp32"]
        return OrtCpuEngine(bundle.file(record.graphs[graph]), 1, weights_folder=bundle.weights_folder(record))

    def decoder(graph: str) -> tuple[Decoder, list[str]]:
        loaded = engine(graph)
        names = [spec.name.removeprefix("past_") for spec in loaded.inputs if spec.name.startswith("past_")]
        return Decoder(loaded, NUM_SLOTS, manifest.max_length), names

    decoders = {graph: decoder(graph) for graph in ("receiver", *(f"sharer{number}" for number in numbers))}
    receiver = decoders["receiver"][0]
    return Engines(
        plan=pipe.make_plan(CHAT, (), tuple(numbers)),
        pools={graph: loaded.pool for graph, (loaded, _) in decoders.items()},
        caches={graph: names for graph, (_, names) in decoders.items()},
        receiver=receiver,
        prefiller=Prefiller(
            receiver,
            {number: decoders[f"sharer{number}"][0] for number in numbers},
            {number: Fuser(engine(f"fuser{number}"), manifest.max_length) for number in numbers},
        ),
    )


@pytest.fixture
def engines(
    name: str, recorded_bundle: Callable[[str], Path], recorded_pipeline: Callable[[str], C2CPipeline]
) -> Engines:
    return load(name, recorded_bundle(name), recorded_pipeline(name))


@every_kind
def test_prefill_fusion_and_decoding_write_nothing_but_the_rows_of_their_slot(name: str, engines: Engines):
    engines.fill_with_random_numbers()
    before = engines.contents()
    num_steps = 4
    engines.prefill_and_decode(1, num_steps)
    after = engines.contents()

    plan = engines.plan
    last_fused = max(section.stop for section in plan.sections if section.fused)
    for (model, cache, slot), found in after.items():
        if model == "receiver":
            written = len(plan.receiver.ids) + num_steps
        else:
            positions = plan.sharers[int(model.removeprefix("sharer"))].position_ids
            written = int(np.count_nonzero(positions < last_fused))
        expected = before[model, cache, slot]
        where = f"{model} {cache} slot {slot}"
        if slot == 1:
            np.testing.assert_array_equal(found[:, :, written:], expected[:, :, written:], err_msg=where)
            assert not (found[:, :, :written] == expected[:, :, :written]).any(), where
        else:
            np.testing.assert_array_equal(found, expected, err_msg=where)


@every_kind
def test_buffers_keep_their_addresses(name: str, engines: Engines):
    before = engines.views()
    engines.prefill_and_decode(0, 2)
    engines.prefill_and_decode(2, 2)
    assert engines.views() == before
    for view in before.values():
        assert view.pointer % 4 == 0
    # The slots of a cache follow one another in one piece of memory.
    for (model, cache, slot), view in before.items():
        first = before[model, cache, 0]
        assert view.pointer == first.pointer + slot * int(np.prod(view.shape)) * 4


@every_kind
def test_what_lies_in_unwritten_rows_has_no_influence(name: str, engines: Engines):
    clean = engines.prefill_and_decode(1, 4)
    engines.fill_with_random_numbers()
    np.testing.assert_array_equal(engines.prefill_and_decode(1, 4), clean)
    engines.fill_with_random_numbers()
    np.testing.assert_array_equal(engines.prefill_and_decode(0, 4), clean)


@pytest.fixture
def bound_receiver(name: str, recorded_bundle: Callable[[str], Path]) -> tuple[OrtCpuEngine, dict[str, View], Any]:
    """A receiver's engine and bindings for two tokens that it runs with."""
    bundle = Bundle.open(recorded_bundle(name))
    engine = OrtCpuEngine(bundle.file(bundle.manifest.receiver_graph.path), 1)
    sizes = {"batch": 1, "tokens": 2}
    buffers, bindings = {}, {}
    for spec in (*engine.inputs, *engine.outputs):
        shape = tuple(size if isinstance(size, int) else sizes.get(size, 1) for size in spec.shape)
        place = spec.name.removeprefix("past_")
        buffers.setdefault(place, engine.device.allocate(shape, spec.dtype))
        bindings[spec.name] = buffers[place].view()
    buffers["kv_length"].write(np.array([2]), slice(None))
    buffers["last_token"].write(np.array([1]), slice(None))
    return engine, bindings, buffers


@unaligned
def test_a_complete_set_of_bindings_runs(name: str, bound_receiver: Any):
    engine, bindings, buffers = bound_receiver
    engine.run(engine.bind(bindings))
    logits = buffers["logits"].read()
    assert np.isfinite(logits).all()
    assert np.abs(logits).max() > 0


@unaligned
def test_a_run_that_onnxruntime_gives_up_is_an_error_that_names_the_graph(name: str, bound_receiver: Any):
    engine, bindings, buffers = bound_receiver
    buffers["input_ids"].write(np.array([[10**6, 7]]), slice(None))
    with pytest.raises(C2CError, match=r"receiver\.onnx: ONNX Runtime .* cannot run this graph: .*Gather"):
        engine.run(engine.bind(bindings))


@unaligned
def test_bindings_that_do_not_fit_the_graph_are_refused_by_name(name: str, bound_receiver: Any):
    engine, good, _ = bound_receiver
    key = good["past_key.0"]
    _, heads, rows, dim = key.shape
    wrong = {
        "missing input": ({k: v for k, v in good.items() if k != "write_index"}, "write_index"),
        "missing output": ({k: v for k, v in good.items() if k != "value.1"}, "value.1"),
        "unknown": ({**good, "surprise": key}, "surprise"),
        "dtype": ({**good, "input_ids": replace(good["input_ids"], dtype="int32")}, "input_ids: bound int32"),
        "dtype of a cache": ({**good, "past_key.0": replace(key, dtype="float16")}, "past_key.0: bound float16"),
        "heads": ({**good, "past_key.0": replace(key, shape=(1, heads + 1, rows, dim))}, "past_key.0"),
        "rows": ({**good, "key.0": replace(key, shape=(1, heads, rows - 1, dim))}, "key.0"),
        "rank": ({**good, "input_ids": replace(good["input_ids"], shape=(2,))}, "input_ids"),
        "device": ({**good, "logits": replace(good["logits"], device="cuda")}, "logits is bound to cuda memory"),
    }
    for bindings, message in wrong.values():
        with pytest.raises(ValueError, match=message):
            engine.bind(bindings)
    engine.run(engine.bind(good))


@unaligned
def test_a_binding_is_run_again_over_what_its_memory_holds_then(name: str, bound_receiver: Any):
    engine, bindings, buffers = bound_receiver
    binding = engine.bind(bindings)

    def logits_of(first: int) -> Array:
        buffers["input_ids"].write(np.array([[first, 7]]), slice(None))
        engine.run(binding)
        return buffers["logits"].read()

    fifth, sixth = logits_of(5), logits_of(6)
    assert not np.array_equal(fifth, sixth)
    np.testing.assert_array_equal(logits_of(5), fifth)


@unaligned
def test_addresses_of_an_engine_that_wants_them_aligned_are_checked_when_bound(name: str, bound_receiver: Any):
    engine, good, _ = bound_receiver
    engine.address_alignment = 64
    engine.bind(good)
    odd = {**good, "logits": replace(good["logits"], pointer=good["logits"].pointer + 4)}
    with pytest.raises(C2CError, match=r"logits of shape .* multiple of 64 bytes.*--max-length"):
        engine.bind(odd)


@unaligned
def test_an_output_that_shares_an_inputs_memory_must_be_bound_there(name: str, bound_receiver: Any):
    engine, good, _ = bound_receiver
    engine.aliases = {"key.0": "past_key.0"}
    engine.bind(good)
    with pytest.raises(ValueError, match=r"key\.0 and past_key\.0 are one cache"):
        engine.bind({**good, "key.0": good["key.1"]})


@unaligned
def test_slots_that_an_engine_cannot_take_are_refused_when_they_are_allocated(name: str, bound_receiver: Any):
    engine, good, _ = bound_receiver
    slot_bytes = int(np.prod(good["past_key.0"].shape)) * 4
    engine.address_alignment = slot_bytes
    KVCachePool(engine, 3)
    engine.address_alignment = 2 * slot_bytes
    KVCachePool(engine, 1)
    with pytest.raises(C2CError, match=rf"past_key\.0: a slot of shape .* {slot_bytes} bytes.*--max-length.*one slot"):
        KVCachePool(engine, 2)


def test_a_view_larger_than_its_part_of_the_buffer_is_refused():
    buffer = CpuDevice().allocate((2, 3, 4), "float32")
    assert buffer.view(1, shape=(1, 12)).shape == (1, 12)
    for index, shape in (((), (25,)), ((0,), (13,)), ((0, 1), (5,))):
        with pytest.raises(ValueError, match="larger than the buffer's part"):
            buffer.view(*index, shape=shape)


def test_views_reads_and_writes_of_a_buffer_are_of_the_same_memory():
    buffer = CpuDevice().allocate((2, 3, 4), "float32")
    assert not buffer.read().any()
    values = np.arange(4, dtype=np.float32)
    buffer.write(values, 1, 2)
    view = buffer.view(1, 2)
    np.testing.assert_array_equal(memory_at(view), values)
    memory_at(view)[0] = 9
    copied = buffer.read(1, slice(None), slice(0, 2))
    assert copied.tolist() == [[0, 0], [0, 0], [9, 1]]
    copied[:] = 5
    assert buffer.read(1, 2, 0) == 9
    assert buffer.view().pointer + (3 + 2) * 4 * 4 == view.pointer


@unaligned
def test_a_truncated_graph_or_weight_file_is_refused_by_name(
    name: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    source = recorded_bundle(name) / "graphs"
    for damaged in ("receiver.onnx", "receiver.onnx.data"):
        folder = Path(shutil.copytree(source, tmp_path / damaged))
        content = (folder / damaged).read_bytes()
        (folder / damaged).write_bytes(content[: len(content) // 2])
        with pytest.raises(C2CError, match=r"receiver\.onnx: ONNX Runtime .* cannot load"):
            OrtCpuEngine(folder / "receiver.onnx")
    with pytest.raises(C2CError, match=r"absent\.onnx"):
        OrtCpuEngine(tmp_path / "absent.onnx")


@every_kind
def test_engines_report_the_inputs_and_outputs_of_the_manifest(name: str, recorded_bundle: Callable[[str], Path]):
    bundle = Bundle.open(recorded_bundle(name))
    manifest = json.loads((bundle.root / "manifest.json").read_text())
    records = [
        manifest["receiver_graph"],
        *(s[key] for s in manifest["sharers"] for key in ("sharer_graph", "fuser_graph")),
    ]
    for record in records:
        engine = OrtCpuEngine(bundle.file(record["path"]), 1)
        for found, kind in ((engine.inputs, "inputs"), (engine.outputs, "outputs")):
            assert [(s.name, s.dtype, list(s.shape)) for s in found] == [
                (s["name"], s["dtype"], s["shape"]) for s in record[kind]
            ]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell a process's memory")
def test_a_buffer_takes_only_the_pages_that_are_written():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    buffer = CpuDevice().allocate((64, 4 << 20), "uint8")
    for head in range(64):  # the first row of each head, as a prompt's first tokens write them
        buffer.write(np.ones(4096, dtype=np.uint8), head, slice(0, 4096))
    assert resident() - before < 16 << 20  # of 256 MiB


def test_a_buffer_that_no_machine_has_is_an_error_that_says_what_to_do():
    with pytest.raises(C2CError, match=r"no memory for a buffer of .* GB; load with fewer num_slots"):
        CpuDevice().allocate((1 << 30, 1 << 30), "float32")
