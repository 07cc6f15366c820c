"""Engines on ONNX Runtime: a session per graph, caches bound by pointer and updated in place, nothing copied.

The CPU provider runs the portable graphs as they are. `TensorScatter` writes in place because the same address is bound
as its input and as its output (https://onnxruntime.ai/docs/api/python/api_summary.html#iobinding).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from c2c_export.bundle import TensorSpec
from c2c_export.errors import C2CError
from engines.base import Array, Buffer, Device, Engine, View

ort.disable_telemetry_events()  # what a user runs is nobody else's business

_ALIGNMENT = 64  # bytes; a cache line and the widest vector register
_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool", "tensor(float16)": "float16"}


class CpuBuffer(Buffer):
    """Host memory, aligned to 64 bytes. `array` is the memory itself, as numpy sees it."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        item = np.dtype(dtype)
        num_bytes = int(np.prod(shape)) * item.itemsize
        raw = np.zeros(num_bytes + _ALIGNMENT, dtype=np.uint8)
        offset = -raw.ctypes.data % _ALIGNMENT
        self.array: Array = raw[offset : offset + num_bytes].view(item).reshape(shape)

    def view(self, *index: int, shape: tuple[int, ...] | None = None) -> View:
        """See `Buffer.view`; the address is that of `array` itself."""
        part = self.array[index] if index else self.array
        shape = part.shape if shape is None else shape
        if int(np.prod(shape)) > part.size:
            raise ValueError(f"a view of shape {shape} is larger than the buffer's part of shape {part.shape}")
        return View(part.ctypes.data, shape, self.dtype, "cpu")

    def read(self, *index: int | slice) -> Array:
        """See `Buffer.read`."""
        return self.array[index].copy()

    def write(self, value: Array, *index: int | slice) -> None:
        """See `Buffer.write`."""
        self.array[index] = value


class CpuDevice(Device):
    """The host's memory."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `Device.allocate`; the system commits the memory page by page, as rows are written."""
        try:
            return CpuBuffer(shape, dtype)
        except MemoryError as error:
            gigabytes = np.prod(shape) * np.dtype(dtype).itemsize / 1e9
            raise C2CError(
                f"no memory for a buffer of {gigabytes:.1f} GB; load with fewer num_slots, or export with a smaller "
                "--max-length"
            ) from error


class OrtCpuEngine(Engine):
    """A graph on ONNX Runtime's CPU provider."""

    def __init__(self, path: Path, num_threads: int | None = None) -> None:
        """Load the graph at `path`; `num_threads` defaults to the machine's physical cores.

        Raises `C2CError` naming the graph when ONNX Runtime cannot load it.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise C2CError(f"{path}: ONNX Runtime {ort.__version__} cannot load this graph: {error}") from error
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self.device = CpuDevice()

    def _run(self, bindings: Mapping[str, View]) -> None:
        binding = self._session.io_binding()
        for spec in self.inputs:
            view = bindings[spec.name]
            binding.bind_input(spec.name, view.device, 0, np.dtype(view.dtype), view.shape, view.pointer)
        for spec in self.outputs:
            view = bindings[spec.name]
            binding.bind_output(spec.name, view.device, 0, np.dtype(view.dtype), view.shape, view.pointer)
        self._session.run_with_iobinding(binding)


def _spec(value: ort.NodeArg) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(name=value.name, dtype=_DTYPES[value.type], shape=shape)
