"""GPU buffers, events and graphs over CUDA's substitute in host memory: which bytes move, when, and what is kept."""

import ast
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real
from fake_cudart import FakeCudart

import engines.cuda
from c2c_export.errors import C2CError
from engines.base import storage_dtype
from engines.cuda import CudaDevice, CudaEvent, call
from engines.ort.engine import CpuDevice

Array = np.ndarray[Any, Any]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setattr(engines.cuda, "_cudart", fake)
    return fake


def numbered(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


PARTS: list[tuple[int | slice, ...]] = [
    (),
    (slice(None),),
    (1,),
    (1, 2),
    (1, 2, slice(1, 3)),
    (0, slice(None), slice(1, 3)),
    (slice(None), 1),
    (1, slice(None), slice(2, 2)),
]


@pytest.mark.parametrize("index", PARTS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_reads_writes_and_copies_are_those_of_a_buffer_on_the_cpu(
    cuda: FakeCudart, index: tuple[int | slice, ...], dtype: str
):
    gpu, cpu = (device.allocate((2, 3, 4, 2), dtype) for device in (CudaDevice(), CpuDevice()))
    assert not gpu.read().any()
    for buffer in (gpu, cpu):
        buffer.write(numbered(2, 3, 4, 2), slice(None))
        buffer.write(-1 - numbered(*buffer.read(*index).shape), *index)
    found, expected = gpu.read(), cpu.read()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    bits = gpu.read_stored(*index)
    assert bits.dtype == storage_dtype(dtype)
    np.testing.assert_array_equal(bits, cpu.read_stored(*index))
    gpu.write(np.zeros(bits.shape, dtype=np.float32), *index)
    gpu.write_stored(bits, *index)
    np.testing.assert_array_equal(gpu.read(), expected)
    np.testing.assert_array_equal(gpu.read(*index), cpu.read(*index))
    copies = [device.allocate((50,), dtype) for device in (CudaDevice(), CpuDevice())]
    for copy, source in zip(copies, (gpu, cpu), strict=True):
        copy.copy_from(source, *index)
    np.testing.assert_array_equal(copies[0].read(), copies[1].read())
    assert gpu.view().device == "cuda"
    if all(isinstance(place, int) for place in index):
        assert gpu.view(*index).shape == cpu.view(*index).shape
        assert gpu.view(*index).pointer - gpu.view().pointer == cpu.view(*index).pointer - cpu.view().pointer


def test_each_copy_has_its_direction_and_an_empty_one_is_none(cuda: FakeCudart):
    device = CudaDevice()
    buffer, other = device.allocate((2, 3, 4), "float32"), device.allocate((9,), "float32")
    cuda.log.clear()
    buffer.write(numbered(3, 2), 0, slice(None), slice(0, 2))
    other.copy_from(buffer, 0, 1)
    buffer.read(0, slice(None), slice(0, 2))
    buffer.write(numbered(3, 0), 0, slice(None), slice(2, 2))
    assert [entry for entry in cuda.log if entry[0].startswith("cudaMemcpy")] == [
        ("cudaMemcpy2DAsync", "cudaMemcpyHostToDevice"),
        ("cudaMemcpyAsync", "cudaMemcpyDeviceToDevice"),
        ("cudaMemcpy2DAsync", "cudaMemcpyDeviceToHost"),
    ]
    # Only a read waits.
    assert cuda.names().count("cudaStreamSynchronize") == 1


def test_what_does_not_fit_is_refused(cuda: FakeCudart):
    device = CudaDevice()
    buffer = device.allocate((2, 3), "float32")
    with pytest.raises(ValueError, match=r"shape \(2,\) for a part of shape \(3,\)"):
        buffer.write(numbered(2), 0)
    with pytest.raises(ValueError, match="an array of float32 for a bfloat16 buffer, which stores uint16"):
        device.allocate((3,), "bfloat16").write_stored(numbered(3), slice(None))
    with pytest.raises(ValueError, match="does not fit"):
        device.allocate((5,), "float32").copy_from(buffer)
    with pytest.raises(ValueError, match="float32 into a float16"):
        device.allocate((9,), "float16").copy_from(buffer)
    with pytest.raises(ValueError, match="cannot copy float32 into a float32 buffer in GPU memory"):
        buffer.copy_from(CpuDevice().allocate((2,), "float32"))
    with pytest.raises(ValueError, match="larger than the buffer's part"):
        buffer.view(0, shape=(4,))


def test_a_written_array_may_change_at_once_and_memory_is_freed_with_its_buffer(cuda: FakeCudart):
    device = CudaDevice()
    buffer, values = device.allocate((4,), "float32"), numbered(4)
    buffer.write(values, slice(None))
    values[:] = 9
    assert buffer.read().tolist() == [0, 1, 2, 3]
    assert len(cuda.memory) == 1
    del buffer
    assert not cuda.memory


def host_arrays(device: CudaDevice) -> list[Array]:
    return [array for _, array in device._in_flight]


def test_host_arrays_are_kept_until_their_copy_is_done_and_no_longer(cuda: FakeCudart):
    """A device that nobody waits for, such as a sharer's, once kept every array that was ever written."""
    device = CudaDevice()
    buffer = device.allocate((4,), "float32")
    cuda.busy = True
    for _ in range(3):
        buffer.write(numbered(4), slice(None))
    assert len(host_arrays(device)) == 3
    kept = weakref.ref(host_arrays(device)[0])
    cuda.busy = False
    buffer.write(numbered(4), slice(None))
    assert len(host_arrays(device)) == 1  # its own
    assert kept() is None
    for _ in range(50):
        buffer.write(numbered(4), slice(None))
    assert len(host_arrays(device)) == 1
    device.synchronize()
    assert not host_arrays(device)


def test_the_event_that_lets_go_of_an_array_is_recorded_behind_its_copy(cuda: FakeCudart):
    device = CudaDevice()
    buffer = device.allocate((4,), "float32")
    cuda.log.clear()
    buffer.write(numbered(4), slice(None))
    assert [name for name in cuda.names() if name in ("cudaMemcpyAsync", "cudaEventRecord")] == [
        "cudaMemcpyAsync",
        "cudaEventRecord",
    ]
    cuda.refused["cudaEventQuery"] = cuda.cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(C2CError, match="cudaEventQuery failed with cudaErrorIllegalAddress"):
        buffer.write(numbered(4), slice(None))


def test_events_join_devices_and_measure_in_seconds(cuda: FakeCudart):
    first, second = CudaDevice(), CudaDevice()
    start = first.record()
    second.wait(start)
    stop = first.record()
    assert isinstance(start, CudaEvent)
    assert isinstance(stop, CudaEvent)
    cuda.log.clear()
    assert stop.seconds_since(start) == 1.5
    assert cuda.log == [("cudaEventSynchronize", (stop.handle,)), ("cudaEventElapsedTime", (start.handle, stop.handle))]
    cuda.log.clear()
    second.wait(stop)
    assert cuda.log == [("cudaStreamWaitEvent", (second.stream, stop.handle, 0))]


def test_an_error_names_the_call_says_what_to_do_and_is_not_left_for_others(cuda: FakeCudart):
    device = CudaDevice()
    cuda.refused["cudaMalloc"] = cuda.cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(C2CError, match=r"^cudaMalloc failed with cudaErrorMemoryAllocation \(a reason\): .*num_slots"):
        device.allocate((4,), "float32")
    assert cuda.names()[-1] == "cudaGetLastError"


# Graphs


def test_captured_work_is_carried_out_when_its_graph_is_launched_each_time(cuda: FakeCudart):
    device = CudaDevice()
    source, target = device.allocate((2,), "float32"), device.allocate((2,), "float32")
    cuda.log.clear()
    graph = device.capture(lambda: target.copy_from(source))
    assert cuda.names() == [
        *("cudaStreamBeginCapture", "cudaMemcpyAsync", "cudaStreamEndCapture"),
        *("cudaGraphInstantiate", "cudaGraphDestroy"),
    ]
    assert cuda.log[0][1] == "cudaStreamCaptureModeThreadLocal"
    for values in ([1, 2], [3, 4]):
        source.write(np.array(values), slice(None))
        assert target.read().tolist() != values
        graph.launch()
        assert target.read().tolist() == values
    executable = graph._executable
    del graph
    assert cuda.log[-1] == ("cudaGraphExecDestroy", (executable,))


def test_no_memory_is_freed_while_work_is_captured(cuda: FakeCudart):
    """The collector once came upon an unused buffer in the middle of a capture, and cudaFree spoiled it."""
    device = CudaDevice()
    cycle: list[Any] = [device.allocate((2,), "float32")]
    cycle.append(cycle)
    thresholds = gc.get_threshold()

    def work() -> None:
        nonlocal cycle
        del cycle
        gc.set_threshold(1, 1, 1)
        made = [[] for _ in range(2000)]  # enough for a collection of every generation
        gc.set_threshold(*thresholds)
        assert len(made) == 2000
        assert cuda.memory

    device.capture(work)
    assert gc.isenabled()
    gc.collect()
    assert not cuda.memory


def test_a_failed_capture_leaves_the_stream_usable_and_the_collector_on(cuda: FakeCudart):
    device = CudaDevice()
    buffer = device.allocate((2,), "float32")

    def fail() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError):
        device.capture(fail)
    assert cuda.names()[-2:] == ["cudaStreamEndCapture", "cudaGetLastError"]
    with pytest.raises(C2CError, match=r"cudaStreamEndCapture failed .*Invalidated.*cannot be captured"):
        device.capture(lambda: call("cudaMalloc", 4))
    assert gc.isenabled()
    buffer.write(np.array([1, 2]), slice(None))
    assert buffer.read().tolist() == [1, 2]


def test_a_collector_that_is_off_stays_off(cuda: FakeCudart):
    device = CudaDevice()
    gc.disable()
    try:
        device.capture(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


# What is really here


def test_the_substitute_is_of_functions_that_cuda_has():
    ours = [name for name in vars(FakeCudart) if name.startswith("cuda")]
    assert len(ours) > 10
    assert [name for name in ours if not hasattr(real, name)] == []


def test_everything_that_is_used_of_cuda_exists():
    tree = ast.parse(Path(engines.cuda.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "call"]
    used = {node.args[0].value for node in calls if isinstance(node.args[0], ast.Constant)}
    sources = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {source.removeprefix("_cudart.") for source in sources if source.startswith("_cudart.")}
    kinds = {f"cudaMemcpyKind.cudaMemcpy{kind}" for kind in ("HostToDevice", "DeviceToHost", "DeviceToDevice")}
    statuses = {f"cudaError_t.{name}" for name in engines.cuda._ADVICE}
    assert len(used) > 20
    for name in sorted({*used, *kinds, *statuses}):
        found: Any = real
        for part in name.split("."):
            assert hasattr(found, part), f"cuda.bindings.runtime has no {name}"
            found = getattr(found, part)


@pytest.fixture
def no_gpu() -> None:
    status, count = real.cudaGetDeviceCount()
    if status == real.cudaError_t.cudaSuccess and count > 0:
        pytest.skip("this machine has a GPU")


def test_without_a_gpu_the_first_call_of_cuda_fails_with_its_name_and_what_to_do(no_gpu: None):
    with pytest.raises(C2CError, match=r"cudaStreamCreateWithFlags failed with cudaError\w+ \(.*c2c-export doctor"):
        CudaDevice()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("cudaMalloc", (16,)), ("cudaFree", (4096,)), ("cudaGetDevice", ()), ("cudaMemGetInfo", ())],
)
def test_an_error_of_cuda_names_the_call(no_gpu: None, name: str, arguments: tuple[Any, ...]):
    with pytest.raises(C2CError, match=rf"^{name} failed with cudaError"):
        call(name, *arguments)
