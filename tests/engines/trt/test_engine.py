"""TensorRT without a GPU: which address goes to which tensor in which profile, what is captured, and clear errors."""

import ast
import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_cudart import FakeCudart
from fake_tensorrt import FakeTensorRT
from hypothesis import given
from hypothesis import strategies as st

import engines.cuda
from c2c_export.errors import C2CError
from engines.base import TensorSpec, View
from engines.cuda import CudaDevice
from engines.trt.bindings import ADDRESS_ALIGNMENT, BindingState, BoundTensors, Profile, bound_tensors, choose_profile
from engines.trt.engine import TrtEngine
from engines.trt.runtime_cache import RuntimeCache
from runtime.cache import KVCachePool

ENGINES = Path(__file__).parents[3] / "engines" / "trt"
CAPACITY, MAX_BATCH, HEADS, SIZE = 256, 8, 2, 64
BASE = 0x7F0000000000


def decoder_profiles() -> list[Profile]:
    def profile(index: int, batch: tuple[int, int], tokens: tuple[int, int]) -> Profile:
        def ends(end: int) -> dict[str, tuple[int, ...]]:
            cache = (batch[end], HEADS, CAPACITY, SIZE)
            return {
                "input_ids": (batch[end], tokens[end]),
                "write_index": (batch[end],),
                "past_key.0": cache,
                "past_value.0": cache,
            }

        return Profile(index, ends(0), ends(1))

    return [profile(0, (1, 1), (1, CAPACITY)), profile(1, (1, MAX_BATCH), (1, 1))]


INPUTS = ("input_ids", "write_index", "past_key.0", "past_value.0")
ALIASES = {"key.0": "past_key.0", "value.0": "past_value.0"}


def bindings_of(slot: int, tokens: int, batch: int = 1) -> dict[str, View]:
    """What the runtime binds for a slot: its own caches, and small buffers that all slots share."""
    stride = HEADS * CAPACITY * SIZE * 2
    cache = (batch, HEADS, CAPACITY, SIZE)
    key = View(BASE + slot * stride, cache, "float16", "cuda")
    value = View(BASE + (1 << 30) + slot * stride, cache, "float16", "cuda")
    return {
        "input_ids": View(BASE + (2 << 30), (batch, tokens), "int64", "cuda"),
        "write_index": View(BASE + (3 << 30), (batch,), "int64", "cuda"),
        "logits": View(BASE + (4 << 30), (batch, 1, 100), "float32", "cuda"),
        "past_key.0": key,
        "key.0": key,
        "past_value.0": value,
        "value.0": value,
    }


def shapes_of(bindings: dict[str, View]) -> dict[str, tuple[int, ...]]:
    return {name: bindings[name].shape for name in INPUTS}


@given(tokens=st.integers(1, CAPACITY), batch=st.integers(1, MAX_BATCH))
def test_a_prompt_takes_the_prefill_profile_and_one_token_the_decode_profile(tokens: int, batch: int):
    shapes = shapes_of(bindings_of(0, tokens, batch))
    if tokens > 1 and batch > 1:
        with pytest.raises(C2CError, match=r"no profile .* holds input_ids of shape"):
            choose_profile(decoder_profiles(), shapes)
    else:
        assert choose_profile(decoder_profiles(), shapes).index == (1 if tokens == 1 else 0)


def test_a_shape_that_no_profile_holds_is_refused_with_the_ranges():
    shapes = shapes_of(bindings_of(0, CAPACITY + 1))
    with pytest.raises(C2CError) as error:
        choose_profile(decoder_profiles(), shapes)
    assert "input_ids of shape [1, 257]" in str(error.value)
    assert "[1, 1] to [1, 256], [1, 1] to [8, 1]" in str(error.value)


def test_only_a_profile_of_single_tokens_is_for_decoding():
    assert [profile.is_decode for profile in decoder_profiles()] == [False, True]
    assert not Profile(0, {"receiver_rows": (1,)}, {"receiver_rows": (1,)}).is_decode


def bound(slot: int, tokens: int, batch: int = 1) -> BoundTensors:
    return bound_tensors(bindings_of(slot, tokens, batch), INPUTS)


def test_everything_is_set_at_first_and_then_only_what_changed():
    state = BindingState(is_capturable=False)
    first = bindings_of(0, 1)
    changes = state.changes(bound(0, 1))
    assert changes.addresses == {name: view.pointer for name, view in first.items()}
    assert changes.shapes == shapes_of(first)  # an output's shape follows from those of the inputs
    state.apply(changes)
    assert (state.changes(bound(0, 1)).addresses, state.changes(bound(0, 1)).shapes) == ({}, {})

    longer = state.changes(bound(0, 5))
    assert longer.addresses == {}
    assert longer.shapes == {"input_ids": (1, 5)}

    other_slot = state.changes(bound(3, 1))
    assert set(other_slot.addresses) == {"past_key.0", "key.0", "past_value.0", "value.0"}
    assert other_slot.shapes == {}


@given(steps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=30))
def test_what_a_context_was_told_is_always_what_is_bound(steps: list[tuple[int, int]]):
    state = BindingState(is_capturable=True)
    addresses: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for slot, tokens in steps:
        tensors = bound(slot, tokens)
        changes = state.changes(tensors)
        assert not any(addresses.get(name) == address for name, address in changes.addresses.items())
        addresses.update(changes.addresses)
        shapes.update(changes.shapes)
        state.apply(changes)
        assert (addresses, shapes) == (tensors.addresses, tensors.shapes)


def act(state: BindingState, tensors: BoundTensors) -> str:
    changes = state.changes(tensors)
    action = state.action(tensors, changes)
    state.apply(changes)
    return action


def test_a_slots_decode_step_is_captured_when_it_comes_the_second_time():
    state, steps = BindingState(is_capturable=True), [bound(slot, 1) for slot in range(2)]
    assert [act(state, steps[slot]) for slot in (0, 0, 1, 1)] == ["enqueue", "capture", "enqueue", "capture"]


def test_slots_that_take_turns_are_captured_too():
    state, steps = BindingState(is_capturable=True), [bound(slot, 1) for slot in range(2)]
    assert [act(state, steps[slot]) for slot in (0, 1, 0, 1)] == ["enqueue", "enqueue", "capture", "capture"]


def test_nothing_is_captured_right_after_a_change_of_shapes():
    state = BindingState(is_capturable=True)
    one, two = bound(0, 1, 1), bound(0, 1, 2)
    assert [act(state, tensors) for tensors in (one, two, one, one)] == ["enqueue"] * 3 + ["capture"]


def test_prefills_are_never_captured():
    state, prompt = BindingState(is_capturable=False), bound(0, 7)
    assert {act(state, prompt) for _ in range(3)} == {"enqueue"}


@given(heads=st.integers(1, 9), rows=st.integers(1, 8), size=st.integers(1, 9), item=st.sampled_from([2, 4]))
def test_capacities_that_the_message_recommends_are_aligned(heads: int, rows: int, size: int, item: int):
    capacity = rows * 128
    assert heads * capacity * size * item % ADDRESS_ALIGNMENT == 0  # a slot of a cache
    assert capacity * 8 % ADDRESS_ALIGNMENT == 0  # and of row_position_ids


# The engine over a substitute for TensorRT


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorRT:
    cudart = FakeCudart()
    monkeypatch.setattr(engines.cuda, "_cudart", cudart)
    monkeypatch.setenv("C2C_EXPORT_CACHE", str(tmp_path / "cache"))
    bound_shapes = shapes_of(bindings_of(0, 1))
    dynamic = {**{name: (-1, *shape[1:]) for name, shape in bound_shapes.items()}, "input_ids": (-1, -1)}
    inputs = {name: ("INT64" if name in ("input_ids", "write_index") else "HALF", dynamic[name]) for name in INPUTS}
    outputs = {output: inputs[source] for output, source in ALIASES.items()}
    profiles = [(profile.smallest, profile.largest) for profile in decoder_profiles()]
    return FakeTensorRT(cudart, inputs, {**outputs, "logits": ("FLOAT", (-1, 1, 100))}, ALIASES, profiles)


@pytest.fixture
def engine(fake: FakeTensorRT, tmp_path: Path) -> TrtEngine:
    path = tmp_path / "receiver.engine"
    path.write_bytes(b"an engine")
    return TrtEngine(path, fake, CudaDevice())


def runs(fake: FakeTensorRT) -> list[tuple[int, int]]:
    """The profile and the slot of every run that was carried out."""
    stride = HEADS * CAPACITY * SIZE * 2
    return [(profile, (addresses["key.0"] - BASE) // stride) for profile, addresses, _ in fake.runs]


def queued(fake: FakeTensorRT) -> list[str]:
    return [name for name in fake.cudart.names() if name in ("kernel", "cudaGraphLaunch", "cudaStreamBeginCapture")]


def test_an_engine_says_what_its_graph_reads_and_writes(engine: TrtEngine):
    assert [spec.name for spec in engine.inputs] == list(INPUTS)
    assert {spec.name: spec.dtype for spec in engine.outputs} == {
        "key.0": "float16",
        "value.0": "float16",
        "logits": "float32",
    }
    assert engine.inputs[2].shape == ("past_key.0.0", HEADS, CAPACITY, SIZE)
    assert engine.aliases == ALIASES
    assert engine.address_alignment == ADDRESS_ALIGNMENT


def test_a_decode_step_is_queued_then_captured_and_then_replayed(engine: TrtEngine, fake: FakeTensorRT):
    steps = [engine.bind(bindings_of(slot, 1)) for slot in range(2)]
    fake.cudart.log.clear()
    for slot in (0, 0, 0, 1, 1, 0):
        engine.run(steps[slot])
    assert runs(fake) == [(1, 0), (1, 0), (1, 0), (1, 1), (1, 1), (1, 0)]
    captured = ["cudaStreamBeginCapture", "kernel", "cudaGraphLaunch"]
    assert queued(fake) == ["kernel", *captured, "cudaGraphLaunch", "kernel", *captured, "cudaGraphLaunch"]


def test_a_prompt_is_queued_in_its_own_context_with_its_own_shape(engine: TrtEngine, fake: FakeTensorRT):
    for tokens in (7, 7, 9):
        engine.run(engine.bind(bindings_of(2, tokens)))
    assert runs(fake) == [(0, 2)] * 3
    assert [shapes["input_ids"] for _, _, shapes in fake.runs] == [(1, 7), (1, 7), (1, 9)]
    assert "cudaStreamBeginCapture" not in fake.cudart.names()


def refuse_to_be_captured(fake: FakeTensorRT) -> str:
    fake.is_capturable = False
    return "TensorRT says that it is not capturable"


def fail_to_end_the_capture(fake: FakeTensorRT) -> str:
    fake.cudart.refused["cudaStreamEndCapture"] = fake.cudart.cudaError_t.cudaErrorStreamCaptureUnsupported
    return "cudaStreamEndCapture failed with cudaErrorStreamCaptureUnsupported"


def fail_to_be_queued_in_a_capture(fake: FakeTensorRT) -> str:
    fake.fails_in_capture = True
    return "cannot run this engine: not while capturing"


@pytest.mark.parametrize("break_it", [refuse_to_be_captured, fail_to_end_the_capture, fail_to_be_queued_in_a_capture])
def test_what_cannot_be_captured_is_queued_with_one_warning(
    break_it: Callable[[FakeTensorRT], str], engine: TrtEngine, fake: FakeTensorRT
):
    reason = break_it(fake)
    steps = [engine.bind(bindings_of(slot, 1)) for slot in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for slot in (0, 0, 0, 1, 1, 1):
            engine.run(steps[slot])
    assert runs(fake) == [(1, 0)] * 3 + [(1, 1)] * 3
    (warning,) = caught
    assert "receiver.engine: decode steps are queued one by one" in str(warning.message)
    assert reason in str(warning.message)
    assert queued(fake).count("cudaStreamBeginCapture") <= 1


def test_a_run_that_tensorrt_refuses_is_an_error_with_its_reason(engine: TrtEngine, fake: FakeTensorRT):
    fake.fails = True
    with pytest.raises(C2CError, match=r"receiver\.engine: tensorrt_rtx 1\.7 cannot run this engine: no memory today"):
        engine.run(engine.bind(bindings_of(0, 7)))


def test_bindings_are_checked_when_they_are_made(engine: TrtEngine):
    good = bindings_of(0, 1)
    odd = {**good, "logits": replace(good["logits"], pointer=BASE + 128)}
    with pytest.raises(C2CError, match=r"logits .* multiple of 256 bytes.*--max-length"):
        engine.bind(odd)
    with pytest.raises(ValueError, match="logits is bound to cpu memory, expected cuda"):
        engine.bind({**good, "logits": replace(good["logits"], device="cpu")})
    with pytest.raises(ValueError, match=r"key\.0 and past_key\.0 are one cache"):
        engine.bind({**good, "key.0": bindings_of(2, 1)["key.0"]})
    with pytest.raises(C2CError, match="no profile of this engine holds"):
        engine.bind(bindings_of(0, 2, 2))


def test_slots_that_are_not_aligned_are_refused_when_they_are_allocated(fake: FakeTensorRT, tmp_path: Path):
    past = ("HALF", (-1, HEADS, 3, 16))
    fake.inputs, fake.outputs = {"past_key.0": past}, {"key.0": past}
    fake.aliases = {"key.0": "past_key.0"}
    fake.profiles = [({"past_key.0": (1, HEADS, 3, 16)}, {"past_key.0": (1, HEADS, 3, 16)})]
    path = tmp_path / "sharer0.engine"
    path.write_bytes(b"an engine")
    engine = TrtEngine(path, fake, CudaDevice())
    KVCachePool(engine, 1)
    with pytest.raises(C2CError, match=r"past_key\.0: a slot of shape \[2, 3, 16\] takes 192 bytes.*--max-length"):
        KVCachePool(engine, 2)


def test_kernels_are_compiled_for_decode_steps_alone(engine: TrtEngine, fake: FakeTensorRT):
    assert [config.dynamic_shapes_kernel_specialization_strategy for config in fake.configs] == ["NONE", "EAGER"]
    assert [config.allocation for config in fake.configs] == ["USER_MANAGED"] * 2


def test_gpu_memory_is_freed_with_the_engine_without_the_collector(fake: FakeTensorRT, tmp_path: Path):
    path = tmp_path / "receiver.engine"
    path.write_bytes(b"an engine")
    gc.collect()
    gc.disable()
    try:
        engine = TrtEngine(path, fake, CudaDevice())
        step = engine.bind(bindings_of(0, 1))
        for _ in range(3):
            engine.run(step)
        assert fake.cudart.memory
        del engine, step
        assert not fake.cudart.memory
        assert "cudaGraphExecDestroy" in fake.cudart.names()
    finally:
        gc.enable()


def test_compiled_kernels_are_kept_for_the_next_start(engine: TrtEngine, fake: FakeTensorRT, tmp_path: Path):
    kernels = tmp_path / "cache" / "kernels"
    assert not kernels.exists()
    fake.kernels = b"compiled"
    cache = engine._runtime_cache
    engine._runtime_cache = None  # type: ignore[assignment]
    assert [config.cache for config in fake.configs] == [fake.caches[0]] * 2  # one for both contexts
    path = cache._path
    del cache
    assert [file.read_bytes() for file in kernels.iterdir()] == [b"compiled"]

    again = RuntimeCache(engine._path)
    again.attach(fake.new_config())
    assert fake.caches[-1].known == b"compiled"
    assert again._path == path


def test_trouble_with_the_runtime_cache_is_a_warning(fake: FakeTensorRT, tmp_path: Path):
    path = tmp_path / "receiver.engine"
    path.write_bytes(b"an engine")
    cache = RuntimeCache(path)
    cache._path.mkdir(parents=True)  # a folder cannot be read as a file, nor replaced by one
    fake.takes_cache, fake.kernels = False, b"compiled"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache.attach(fake.new_config())
        cache.attach(fake.new_config())
        del cache
    assert [str(warning.message).split(": ")[1] for warning in caught] == [
        "compiled kernels cannot be read, and are compiled anew",
        "TensorRT does not take this runtime cache; kernels are compiled anew at every start",
        "compiled kernels cannot be kept for the next start",
    ]


# What TensorRT for RTX does without a GPU


@pytest.fixture
def trt() -> Any:
    pytest.importorskip("cuda.bindings.runtime")
    return pytest.importorskip("tensorrt_rtx")


def test_a_file_that_is_no_engine_is_refused_by_name_with_tensorrts_reason(trt: Any, tmp_path: Path):
    path = tmp_path / "receiver.engine"
    path.write_bytes(b"no engine" * 100)
    with pytest.raises(C2CError) as error:
        TrtEngine(path, trt, None)  # type: ignore[arg-type]  # the file is read before the device is used
    message = str(error.value)
    assert message.startswith(f"{path}: tensorrt_rtx {trt.__version__} cannot load this engine: ")
    assert "it gave no reason" not in message
    assert "doctor" in message
    assert len(message.splitlines()) <= 2


MODULE = "the module"
TENSORRT_OBJECTS: dict[str, dict[str, str]] = {
    "engine.py": {
        "trt": MODULE,
        "self._trt": MODULE,
        "self._runtime": "Runtime",
        "self._engine": "ICudaEngine",
        "config": "IRuntimeConfig",
        "strategies": "DynamicShapesKernelSpecializationStrategy",
        "context": "IExecutionContext",
        "self._context": "IExecutionContext",
    },
    "runtime_cache.py": {"config": "IRuntimeConfig", "cache": "IRuntimeCache", "self._cache": "IRuntimeCache"},
    "header.py": {"trt": MODULE, "runtime": "Runtime"},
    "log.py": {"trt": MODULE},
    "build.py": {
        "trt": MODULE,
        "self._trt": MODULE,
        "builder": "Builder",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "content": "IHostMemory",
        "serialized": "IHostMemory",
    },
    "network.py": {
        "trt": MODULE,
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "error": "ParserError",
        "layer": "ILayer",
        "layer.attention": "IAttention",
        "tensor": "ITensor",
    },
}
"""What the expressions of each file of engines/trt hold; each attribute that they are asked for is looked up."""
NOT_TENSORRT = {"log", "severity", "layers", "diagnostics"}
"""Parameters of an open type that no attribute of TensorRT's is taken of."""


@pytest.mark.parametrize("file", sorted(TENSORRT_OBJECTS))
def test_every_attribute_that_is_used_of_tensorrts_objects_exists(file: str, trt: Any):
    tree = ast.parse((ENGINES / file).read_text(encoding="utf-8"))
    objects = TENSORRT_OBJECTS[file]
    used, checked = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None and ast.unparse(node.annotation) == "Any":
            assert node.arg in objects or node.arg in NOT_TENSORRT, f"{file}: what is {node.arg}? Add it to this test"
        if not isinstance(node, ast.Attribute):
            continue
        source = ast.unparse(node)
        roots = [root for root in objects if source.startswith(f"{root}.")]
        if not roots:
            continue
        root = max(roots, key=len)
        used.add(root)
        found: Any = trt if objects[root] == MODULE else getattr(trt, objects[root])
        names = source.removeprefix(f"{root}.").split(".")
        if not all(name.isidentifier() for name in names):
            continue  # a call or an index is between: its parts are nodes of their own
        for name in names:
            if isinstance(found, property):
                break
            if found is getattr(trt, "ILayer", None) and name == "attention":
                found = trt.IAttentionInputLayer  # the class that network.py gives it
            assert hasattr(found, name), f"{file}: {source}: {found} has no {name}"
            found = getattr(found, name)
        checked.append(source)
    assert checked
    unused = sorted(objects.keys() - used)
    assert not unused, f"{file}: nothing is asked of {', '.join(unused)} any more; take it out of this test"


def test_every_file_of_the_backend_is_looked_through():
    without_tensorrt = {"__init__.py", "bindings.py"}
    assert {path.name for path in ENGINES.glob("*.py")} == TENSORRT_OBJECTS.keys() | without_tensorrt


def test_every_type_of_a_graphs_tensors_is_known_to_tensorrt(trt: Any):
    from engines.trt.engine import _DTYPES

    assert set(_DTYPES) <= set(trt.DataType.__members__)
    for name in _DTYPES:
        TensorSpec(name="x", dtype=_DTYPES[name], shape=(1,))


def test_importing_the_runtime_brings_in_neither_cuda_nor_tensorrt(recorded_bundle: Callable[[str], Path]):
    import subprocess
    import sys

    code = (
        "import sys, runtime\n"
        "runtime.C2CPipeline.from_bundle(sys.argv[1])\n"
        "assert not {name.split('.')[0] for name in sys.modules} & {'cuda', 'tensorrt', 'tensorrt_rtx'}\n"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code, str(recorded_bundle("qwen3_from_qwen2"))]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
