"""TensorRT without a GPU: which address goes to which tensor in which profile, what is captured, and clear errors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2c_export.errors import C2CError
from engines.base import TensorSpec, View
from engines.trt.bindings import BindingState, Profile, check_addresses, choose_profile, key_of

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


def test_everything_is_set_at_first_and_then_only_what_changed():
    state = BindingState(INPUTS, is_capturable=False)
    first = bindings_of(0, 1)
    changes = state.changes(first)
    assert changes.addresses == {name: view.pointer for name, view in first.items()}
    assert changes.shapes == shapes_of(first)  # an output's shape follows from those of the inputs
    state.apply(changes)
    assert (state.changes(first).addresses, state.changes(first).shapes) == ({}, {})

    longer = bindings_of(0, 5)
    assert state.changes(longer).addresses == {}
    assert state.changes(longer).shapes == {"input_ids": (1, 5)}

    other_slot = bindings_of(3, 1)
    assert set(state.changes(other_slot).addresses) == {"past_key.0", "key.0", "past_value.0", "value.0"}
    assert state.changes(other_slot).shapes == {}


@given(steps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=30))
def test_what_a_context_was_told_is_always_what_is_bound(steps: list[tuple[int, int]]):
    state = BindingState(INPUTS, is_capturable=True)
    addresses: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for slot, tokens in steps:
        bindings = bindings_of(slot, tokens)
        changes = state.changes(bindings)
        assert not any(addresses.get(name) == address for name, address in changes.addresses.items())
        addresses.update(changes.addresses)
        shapes.update(changes.shapes)
        state.apply(changes)
        assert addresses == {name: view.pointer for name, view in bindings.items()}
        assert shapes == shapes_of(bindings)


def act(state: BindingState, bindings: dict[str, View]) -> str:
    changes = state.changes(bindings)
    action = state.action(key_of(bindings), changes)
    state.apply(changes)
    return action


def test_a_slots_decode_step_is_captured_when_it_comes_the_second_time():
    state = BindingState(INPUTS, is_capturable=True)
    assert [act(state, bindings_of(slot, 1)) for slot in (0, 0, 1, 1)] == ["enqueue", "capture", "enqueue", "capture"]


def test_slots_that_take_turns_are_captured_too():
    state = BindingState(INPUTS, is_capturable=True)
    assert [act(state, bindings_of(slot, 1)) for slot in (0, 1, 0, 1)] == ["enqueue", "enqueue", "capture", "capture"]


def test_nothing_is_captured_right_after_a_change_of_shapes():
    state = BindingState(INPUTS, is_capturable=True)
    batches = (1, 2, 1, 1)
    assert [act(state, bindings_of(0, 1, batch)) for batch in batches] == ["enqueue"] * 3 + ["capture"]


def test_prefills_are_never_captured():
    state = BindingState(INPUTS, is_capturable=False)
    assert {act(state, bindings_of(0, 7)) for _ in range(3)} == {"enqueue"}


def test_a_graphs_key_is_every_address_and_shape():
    first = bindings_of(0, 1)
    assert key_of(first) == key_of(dict(reversed(first.items())))
    for name, view in first.items():
        for other in (replace(view, pointer=view.pointer + 256), replace(view, shape=(*view.shape[:-1], 9))):
            assert key_of({**first, name: other}) != key_of(first)


def test_an_output_in_place_must_be_bound_where_its_input_is():
    good = bindings_of(1, 1)
    check_addresses(good, ALIASES)
    apart = {**good, "key.0": bindings_of(2, 1)["key.0"]}
    with pytest.raises(ValueError, match=r"key\.0 and past_key\.0 are one cache"):
        check_addresses(apart, ALIASES)


def test_addresses_must_be_aligned_and_on_the_gpu():
    good = bindings_of(0, 1)
    odd = {**good, "logits": replace(good["logits"], pointer=BASE + 128)}
    with pytest.raises(C2CError, match=r"logits .* multiple of 256 bytes.*--max-length"):
        check_addresses(odd, ALIASES)
    with pytest.raises(ValueError, match="logits is bound to cpu memory"):
        check_addresses({**good, "logits": replace(good["logits"], device="cpu")}, ALIASES)


@given(heads=st.integers(1, 9), rows=st.integers(1, 8), size=st.integers(1, 9), slot=st.integers(0, 7))
def test_capacities_that_the_message_recommends_are_aligned(heads: int, rows: int, size: int, slot: int):
    capacity = rows * 128
    view = View(BASE + slot * heads * capacity * size * 2, (1, heads, capacity, size), "float16", "cuda")
    positions = View(BASE + slot * capacity * 8, (1, capacity), "int64", "cuda")
    check_addresses({"past_key.0": view, "row_position_ids": positions}, {})


# What TensorRT for RTX does without a GPU


@pytest.fixture
def trt() -> Any:
    pytest.importorskip("cuda.bindings.runtime")
    return pytest.importorskip("tensorrt_rtx")


def has_gpu() -> bool:
    from cuda.bindings import runtime as cudart

    status, count = cudart.cudaGetDeviceCount()
    return status == cudart.cudaError_t.cudaSuccess and count > 0


def test_a_file_that_is_no_engine_is_refused_by_name_with_tensorrts_reason(trt: Any, tmp_path: Path):
    from engines.trt.engine import TrtEngine

    path = tmp_path / "receiver.engine"
    path.write_bytes(b"no engine" * 100)
    with pytest.raises(C2CError) as error:
        TrtEngine(path, trt, None)  # type: ignore[arg-type]  # the file is read before the device is used
    message = str(error.value)
    assert message.startswith(f"{path}: tensorrt_rtx {trt.__version__} cannot load this engine: ")
    assert "it gave no reason" not in message
    assert "doctor" in message
    assert len(message.splitlines()) <= 2


def test_every_function_of_tensorrt_that_the_engine_calls_exists(trt: Any):
    wanted = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            *("num_io_tensors", "num_optimization_profiles", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype"),
            *("get_tensor_shape", "get_tensor_location", "get_tensor_profile_shape", "get_aliased_input_tensor"),
            *("create_runtime_config", "create_execution_context", "get_device_memory_size_for_profile_v2"),
        ],
        trt.IRuntimeConfig: [
            *("dynamic_shapes_kernel_specialization_strategy", "set_execution_context_allocation_strategy"),
        ],
        trt.ExecutionContextAllocationStrategy: ["USER_MANAGED"],
        trt.IExecutionContext: [
            *("set_optimization_profile_async", "set_tensor_address", "set_input_shape", "execute_async_v3"),
            *("is_stream_capturable", "set_device_memory"),
        ],
        trt.DynamicShapesKernelSpecializationStrategy: ["EAGER", "LAZY"],
        trt.TensorLocation: ["DEVICE"],
        trt.TensorIOMode: ["INPUT"],
    }
    for owner, names in wanted.items():
        assert [name for name in names if not hasattr(owner, name)] == []


def test_every_type_of_a_graphs_tensors_is_known_to_tensorrt(trt: Any):
    from engines.trt.engine import _DTYPES

    assert set(_DTYPES) <= set(trt.DataType.__members__)
    for name in _DTYPES:
        TensorSpec(name="x", dtype=_DTYPES[name], shape=(1,))


@pytest.fixture
def no_gpu() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    if has_gpu():
        pytest.skip("this machine has a GPU")


def test_without_a_gpu_the_first_call_of_cuda_fails_with_its_name_and_what_to_do(no_gpu: None):
    from engines.cuda import CudaDevice

    with pytest.raises(C2CError, match=r"cudaStreamCreateWithFlags failed with cudaError\w+ \(.*c2c-export doctor"):
        CudaDevice()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("cudaMalloc", (16,)), ("cudaFree", (4096,)), ("cudaGetDevice", ()), ("cudaMemGetInfo", ())],
)
def test_an_error_of_cuda_names_the_call(no_gpu: None, name: str, arguments: tuple[Any, ...]):
    from engines.cuda import call

    with pytest.raises(C2CError, match=rf"^{name} failed with cudaError"):
        call(name, *arguments)


def test_every_function_of_cuda_that_devices_call_exists() -> None:
    cudart = pytest.importorskip("cuda.bindings.runtime")
    import ast

    import engines.cuda

    tree = ast.parse(Path(engines.cuda.__file__).read_text(encoding="utf-8"))
    called = [
        node.args[0] for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "call"
    ]
    names = {argument.value for argument in called if isinstance(argument, ast.Constant)}
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_cudart"
    }
    assert len(names) > 10
    assert [name for name in sorted({*names, *attributes}) if not hasattr(cudart, name)] == []
    kinds = ("HostToDevice", "DeviceToHost", "DeviceToDevice")
    assert all(hasattr(cudart.cudaMemcpyKind, f"cudaMemcpy{kind}") for kind in kinds)
    assert hasattr(cudart.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")


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
