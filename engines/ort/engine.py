"""Engines on ONNX Runtime: a session per graph, caches bound by pointer and updated in place, nothing copied.

Operators that write a cache do so in place because the same address is bound as their input and as their output
(https://onnxruntime.ai/docs/api/python/api_summary.html#iobinding). `OrtEngine` is what the CPU provider and the CUDA
provider (`engines.ort.cuda`) have in common.
"""

import contextlib
import math
import mmap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort

from c2c_export.bundle import TensorSpec
from c2c_export.errors import C2CError, reason_of
from engines.base import BFLOAT16, Array, Binding, Buffer, Device, Engine, Event, View, check_stored, storage_dtype
from engines.cores import session_threads
from engines.ort.mapped_weights import let_go_of_mapped_weights

ort.disable_telemetry_events()  # what a user runs is nobody else's business

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": BFLOAT16,
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type to pass


class CpuBuffer(Buffer):
    """Host memory that begins at a page. `array` is the memory itself, as numpy sees it (bfloat16 as uint16)."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        item = storage_dtype(dtype)
        self.array: Array = np.frombuffer(
            _zeroed_pages(math.prod(shape) * item.itemsize), item, count=math.prod(shape)
        ).reshape(shape)

    def view(self, *index: int, shape: tuple[int, ...] | None = None) -> View:
        """See `Buffer.view`; the address is that of `array` itself."""
        part = self.array[index] if index else self.array
        shape = part.shape if shape is None else shape
        if int(np.prod(shape)) > part.size:
            raise ValueError(f"a view of shape {shape} is larger than the buffer's part of shape {part.shape}")
        return View(part.ctypes.data, shape, self.dtype, "cpu")

    def read_stored(self, *index: int | slice) -> Array:
        """See `Buffer.read_stored`."""
        return self.array[index].copy()

    def write_stored(self, value: Array, *index: int | slice) -> None:
        """See `Buffer.write_stored`."""
        check_stored(value, self.dtype)
        self.array[index] = value

    def copy_from(self, source: Buffer, *index: int | slice) -> None:
        """See `Buffer.copy_from`."""
        if not isinstance(source, CpuBuffer) or source.dtype != self.dtype:
            raise ValueError(f"cannot copy {source.dtype} into a {self.dtype} buffer in host memory")
        part = source.array[index]
        if part.size > self.array.size:
            raise ValueError(f"a part of shape {part.shape} does not fit a buffer of shape {self.shape}")
        self.array.reshape(-1)[: part.size].reshape(part.shape)[...] = part


class CpuEvent(Event):
    """The moment of its making: on the CPU everything is done when a call returns."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def seconds_since(self, earlier: Event) -> float:
        """See `Event.seconds_since`."""
        assert isinstance(earlier, CpuEvent)
        return self._time - earlier._time


class CpuDevice(Device):
    """The host's memory. Work is done in the order of the calls, before they return."""

    memory: ClassVar[str] = "cpu"

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `Device.allocate`; the system commits the memory page by page, as rows are written."""
        try:
            return CpuBuffer(shape, dtype)
        except (OSError, OverflowError, MemoryError) as error:
            gigabytes = math.prod(shape) * storage_dtype(dtype).itemsize / 1e9
            raise C2CError(
                f"no memory for a buffer of {gigabytes:.1f} GB; load with fewer num_slots, or export with a smaller "
                "--max-length"
            ) from error

    def record(self) -> Event:
        """See `Device.record`."""
        return CpuEvent()

    def wait(self, event: Event) -> None:
        """See `Device.wait`; every event is reached already."""


@dataclass(frozen=True)
class OrtBinding(Binding):
    """ONNX Runtime's prepared binding, and the views that it was made from."""

    prepared: ort.IOBinding
    views: Mapping[str, View]


class OrtEngine(Engine):
    """A graph on one of ONNX Runtime's execution providers."""

    def __init__(
        self,
        path: Path,
        device: Device,
        providers: list[Any],
        options: ort.SessionOptions,
        run_options: ort.RunOptions,
        weights_folder: Path | None = None,
    ) -> None:
        """Load the graph at `path`, whose weights lie beside it, or else in `weights_folder`.

        Raises `C2CError` naming the graph when ONNX Runtime cannot load it.
        """
        options.log_severity_level = 3
        graph: str | bytes = str(path)
        try:
            if weights_folder is not None:
                # ONNX Runtime looks for weights elsewhere only where the graph does not come from a file.
                options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights_folder))
                graph = path.read_bytes()
            self._session = ort.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise C2CError(f"{path}: ONNX Runtime {ort.__version__} cannot load this graph: {error}") from error
        self._path, self._run_options = path, run_options
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self.device = device

    def run(self, binding: Binding) -> None:
        """See `Engine.run`."""
        assert isinstance(binding, OrtBinding)
        try:
            self._session.run_with_iobinding(binding.prepared, self._run_options)
        except Exception as error:  # see above; most likely memory that a long prompt needs and is not there
            raise C2CError(
                f"{self._path}: ONNX Runtime {ort.__version__} cannot run this graph: {reason_of(error)}"
            ) from error

    def _bind(self, views: Mapping[str, View]) -> Binding:
        prepared = self._session.io_binding()
        for spec in self.inputs:
            bind_input(prepared, spec.name, views[spec.name])
        for spec in self.outputs:
            view = views[spec.name]
            prepared.bind_output(spec.name, view.device, 0, _element_type(view.dtype), view.shape, view.pointer)
        return OrtBinding(prepared, views)


class OrtCpuEngine(OrtEngine):
    """A graph on ONNX Runtime's CPU provider."""

    def __init__(
        self,
        path: Path,
        num_threads: int | None = None,
        device: Device | None = None,
        weights_folder: Path | None = None,
    ) -> None:
        """Load the graph at `path`, whose weights lie beside it, or else in `weights_folder`.

        `num_threads` defaults to the physical cores that this process may use. Raises `C2CError` naming the graph
        when ONNX Runtime cannot load it.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = session_threads(num_threads)
        # Products with integer weights become MatMulNBits, which by default would round the activations to int8 too.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # An arena and a plan of its use by shape save no time, and hold for good what the longest prompt needed once.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        # Else this session's threads would spin on for tens of milliseconds on the cores that the next one computes on.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = ["CPUExecutionProvider"]
        super().__init__(path, device or CpuDevice(), providers, options, ort.RunOptions(), weights_folder)
        let_go_of_mapped_weights(path.parent if weights_folder is None else weights_folder)


def bind_input(prepared: ort.IOBinding, name: str, view: View) -> None:
    """Bind a view as the input `name`. Where the graph reads it from other memory, its contents are copied here."""
    prepared.bind_input(name, view.device, 0, _element_type(view.dtype), view.shape, view.pointer)


def _zeroed_pages(num_bytes: int) -> mmap.mmap:
    """Memory of its own, at least `num_bytes`, of which the system commits what is touched, page by page.

    numpy would ask for huge pages from 4 MB on: then the first row of each head commits 2 MB of its cache.
    """
    size = max(num_bytes, 1)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # A kernel without huge pages refuses the advice, and does not need it.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


def _element_type(dtype: str) -> np.dtype[np.generic] | int:
    return _ONNX_BFLOAT16 if dtype == BFLOAT16 else np.dtype(dtype)


def _spec(value: ort.NodeArg) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(name=value.name, dtype=_DTYPES[value.type], shape=shape)
