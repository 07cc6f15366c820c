"""GPU memory, queues and captured graphs, straight from the CUDA runtime (`cuda-python`), without torch.

In: shapes, host arrays, and work that others queue on a device's stream. Out: buffers, events, graphs; every error of
CUDA as a `C2CError` that names the call. What part of a buffer lies where is computed in `engines.regions`. This file
is tested over a substitute for CUDA in host memory, and has never been executed on a GPU (docs/gpu.md).

Not covered: several GPUs in one process. The first visible one is used; CUDA_VISIBLE_DEVICES chooses it.
"""

import gc
import importlib
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from c2c_export.errors import C2CError
from engines.base import Array, Buffer, Device, Event, View, check_stored, storage_dtype
from engines.regions import Region, region_of

# Imported by name: the package has no type information, and is installed only where there is a GPU to use.
_cudart: Any = importlib.import_module("cuda.bindings.runtime")

_NO_GPU = "no usable GPU or driver here; `c2c-export doctor` says what this machine has"
_ADVICE = {
    "cudaErrorMemoryAllocation": (
        "free GPU memory, open fewer slots (num_slots), or export with a smaller --max-length"
    ),
    "cudaErrorInsufficientDriver": _NO_GPU,
    "cudaErrorNoDevice": _NO_GPU,
    "cudaErrorDevicesUnavailable": _NO_GPU,
    "cudaErrorSystemDriverMismatch": _NO_GPU,
    "cudaErrorCallRequiresNewerDriver": "update the NVIDIA driver",
    **dict.fromkeys(
        ("cudaErrorStreamCaptureUnsupported", "cudaErrorStreamCaptureInvalidated"),
        "this work cannot be captured in a CUDA graph; queue it instead",
    ),
}
_OTHER_ADVICE = "start a new process, as CUDA cannot be used after a failure; CUDA_LAUNCH_BLOCKING=1 finds the cause"


def call(name: str, *arguments: Any) -> Any:
    """Call the CUDA runtime's function of that name; what it returns besides its status, or None.

    Raises `C2CError` naming the function, the status and what to do.
    """
    status, *values = getattr(_cudart, name)(*arguments)
    if status != _cudart.cudaError_t.cudaSuccess:
        raise _error(name, status)
    return values[0] if values else None


def _error(name: str, status: Any) -> C2CError:
    # CUDA keeps the last error for whoever asks next, which should not be a library that did nothing wrong.
    _cudart.cudaGetLastError()
    _, text = _cudart.cudaGetErrorString(status)
    advice = _ADVICE.get(status.name, _OTHER_ADVICE)
    return C2CError(f"{name} failed with {status.name} ({text.decode()}): {advice}")


class CudaEvent(Event):
    """A CUDA event, recorded when it is made."""

    def __init__(self, stream: Any) -> None:
        self.handle = call("cudaEventCreateWithFlags", _cudart.cudaEventDefault)
        # At the interpreter's end the driver may be gone already, and frees everything itself.
        weakref.finalize(self, _cudart.cudaEventDestroy, self.handle).atexit = False
        call("cudaEventRecord", self.handle, stream)

    def is_reached(self) -> bool:
        """Whether everything queued before it is done; does not wait."""
        (status,) = _cudart.cudaEventQuery(self.handle)
        if status not in (_cudart.cudaError_t.cudaSuccess, _cudart.cudaError_t.cudaErrorNotReady):
            raise _error("cudaEventQuery", status)
        return bool(status == _cudart.cudaError_t.cudaSuccess)

    def seconds_since(self, earlier: Event) -> float:
        """See `Event.seconds_since`."""
        assert isinstance(earlier, CudaEvent)
        call("cudaEventSynchronize", self.handle)
        return float(call("cudaEventElapsedTime", earlier.handle, self.handle)) / 1000


class CudaGraph:
    """Work that was captured once and is queued again by one call, with the addresses and shapes of the capture."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._stream = stream
        self._executable = call("cudaGraphInstantiate", graph, 0)
        weakref.finalize(self, _cudart.cudaGraphExecDestroy, self._executable).atexit = False

    def launch(self) -> None:
        """Queue the work."""
        call("cudaGraphLaunch", self._executable, self._stream)


class CudaDevice(Device):
    """The first visible GPU, with a stream of its own that does not wait for the default stream."""

    memory: ClassVar[str] = "cuda"

    def __init__(self) -> None:
        """Make the stream. Raises `C2CError` when there is no usable GPU."""
        self.stream = call("cudaStreamCreateWithFlags", _cudart.cudaStreamNonBlocking)
        weakref.finalize(self, _cudart.cudaStreamDestroy, self.stream).atexit = False
        self._in_flight: deque[tuple[CudaEvent, Array]] = deque()

    @property
    def stream_address(self) -> int:
        """The stream's handle as a number, for libraries that take it so."""
        return int(self.stream)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `Device.allocate`. Addresses are multiples of 256."""
        return CudaBuffer(self, shape, dtype)

    def record(self) -> Event:
        """See `Device.record`."""
        return CudaEvent(self.stream)

    def wait(self, event: Event) -> None:
        """See `Device.wait`."""
        assert isinstance(event, CudaEvent)
        call("cudaStreamWaitEvent", self.stream, event.handle, _cudart.cudaEventWaitDefault)

    def synchronize(self) -> None:
        """Wait until everything queued is done."""
        call("cudaStreamSynchronize", self.stream)
        self._in_flight.clear()

    def keep_until_done(self, value: Array) -> None:
        """Keep a host array that a copy reads which was queued last, until that copy is done."""
        self._in_flight.append((CudaEvent(self.stream), value))

    def let_go_of_done(self) -> None:
        """Let go of the host arrays whose copies are done. Not every device is ever waited for: a sharer's is not."""
        while self._in_flight and self._in_flight[0][0].is_reached():
            self._in_flight.popleft()

    def capture(self, queue_work: Callable[[], None]) -> CudaGraph:
        """What `queue_work` queues on the stream, as a graph; it is not carried out now.

        Raises `C2CError` when it cannot be captured, or what `queue_work` raises; the stream can be used on.
        """
        # A collection could come upon an unused buffer, and cudaFree in a thread that captures spoils the capture.
        was_collecting = gc.isenabled()
        gc.disable()
        try:
            graph = self._capture(queue_work)
        finally:
            if was_collecting:
                gc.enable()
        try:
            return CudaGraph(graph, self.stream)
        finally:
            call("cudaGraphDestroy", graph)

    def _capture(self, queue_work: Callable[[], None]) -> Any:
        call("cudaStreamBeginCapture", self.stream, _cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            queue_work()
        except BaseException:
            # Takes the stream out of the capture; that it failed is known already.
            _cudart.cudaStreamEndCapture(self.stream)
            _cudart.cudaGetLastError()
            raise
        return call("cudaStreamEndCapture", self.stream)


class CudaBuffer(Buffer):
    """GPU memory; copies are queued on its device's stream."""

    def __init__(self, device: CudaDevice, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self._device = device
        self._item = storage_dtype(dtype)
        num_bytes = int(np.prod(shape)) * self._item.itemsize
        self.pointer = int(call("cudaMalloc", max(num_bytes, 1)))
        weakref.finalize(self, _cudart.cudaFree, self.pointer).atexit = False
        call("cudaMemsetAsync", self.pointer, 0, num_bytes, device.stream)
        # Another device's stream may be the first to use this buffer.
        device.synchronize()

    def view(self, *index: int, shape: tuple[int, ...] | None = None) -> View:
        """See `Buffer.view`."""
        region = self._region(index)
        shape = region.shape if shape is None else shape
        if int(np.prod(shape)) * self._item.itemsize > region.num_bytes:
            raise ValueError(f"a view of shape {shape} is larger than the buffer's part of shape {region.shape}")
        return View(self.pointer + region.offset, shape, self.dtype, "cuda")

    def read_stored(self, *index: int | slice) -> Array:
        """See `Buffer.read_stored`."""
        region = self._region(index)
        host: Array = np.empty(region.shape, dtype=self._item)
        self._copy(host.ctypes.data, region.width, self.pointer + region.offset, region.pitch, region, "DeviceToHost")
        self._device.synchronize()
        return host

    def write_stored(self, value: Array, *index: int | slice) -> None:
        """See `Buffer.write_stored`."""
        check_stored(value, self.dtype)
        region = self._region(index)
        host = np.array(value, order="C")
        if host.shape != region.shape:
            raise ValueError(f"an array of shape {host.shape} for a part of shape {region.shape}")
        self._device.let_go_of_done()
        self._copy(self.pointer + region.offset, region.pitch, host.ctypes.data, region.width, region, "HostToDevice")
        self._device.keep_until_done(host)

    def copy_from(self, source: Buffer, *index: int | slice) -> None:
        """See `Buffer.copy_from`."""
        if not isinstance(source, CudaBuffer) or source.dtype != self.dtype:
            raise ValueError(f"cannot copy {source.dtype} into a {self.dtype} buffer in GPU memory")
        region = source._region(index)
        if region.num_bytes > int(np.prod(self.shape)) * self._item.itemsize:
            raise ValueError(f"a part of shape {region.shape} does not fit a buffer of shape {self.shape}")
        self._copy(self.pointer, region.width, source.pointer + region.offset, region.pitch, region, "DeviceToDevice")

    def _region(self, index: tuple[int | slice, ...]) -> Region:
        return region_of(self.shape, index, self._item.itemsize)

    def _copy(self, to: int, to_pitch: int, start: int, pitch: int, region: Region, direction: str) -> None:
        if region.num_bytes == 0:
            return
        kind = getattr(_cudart.cudaMemcpyKind, f"cudaMemcpy{direction}")
        stream = self._device.stream
        if region.height == 1:
            call("cudaMemcpyAsync", to, start, region.width, kind, stream)
        else:
            call("cudaMemcpy2DAsync", to, to_pitch, start, pitch, region.width, region.height, kind, stream)
