"""Run engines built with TensorRT or TensorRT for RTX: addresses set once, decode steps replayed from CUDA graphs.

In: an engine file, the module that built it, and a GPU with its stream. Out: an `Engine`. What an execution context has
to be told is computed in `engines.trt.bindings`; what is in this file only calls TensorRT. It is tested over a
substitute for TensorRT, and beyond reading a file has never been executed on a GPU (docs/gpu.md).

Not covered: building (`engines.trt.build`), and inputs that TensorRT wants in host memory.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c2c_export.bundle import TensorSpec
from c2c_export.errors import C2CError
from engines.base import BFLOAT16, Binding, Engine, View
from engines.cuda import CudaDevice, CudaGraph
from engines.trt.bindings import (
    ADDRESS_ALIGNMENT,
    BindingState,
    BoundTensors,
    Profile,
    bound_tensors,
    choose_profile,
)
from engines.trt.log import error_log
from engines.trt.runtime_cache import RuntimeCache

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": BFLOAT16,
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


class TrtEngine(Engine):
    """A deserialised engine with one execution context for each of its optimisation profiles."""

    device: CudaDevice
    address_alignment = ADDRESS_ALIGNMENT

    def __init__(self, path: Path, trt: Any, device: CudaDevice) -> None:
        """Load the engine file at `path` with the module `trt` (`tensorrt` or `tensorrt_rtx`).

        Raises `C2CError` naming the file when it was built for another version or GPU, or does not fit into memory.
        """
        self._path, self._trt, self.device = path, trt, device
        self._errors = _Errors(path, trt)
        self._engine = self._deserialize()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        for name in names:
            if self._engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise C2CError(f"{path}: {name} is wanted in host memory; build the engine again with this version")
        self.inputs = tuple(self._spec(name) for name in inputs)
        self.outputs = tuple(self._spec(name) for name in outputs)
        aliases = {name: self._engine.get_aliased_input_tensor(name) for name in outputs}
        self.aliases = {name: source for name, source in aliases.items() if source}
        self._profiles = [self._profile(index, inputs) for index in range(self._engine.num_optimization_profiles)]
        # The contexts never run at the same time, so one working memory serves them all.
        sizes = [self._engine.get_device_memory_size_for_profile_v2(profile.index) for profile in self._profiles]
        self._working_memory = device.allocate((max(sizes),), "uint8")
        self._runtime_cache = RuntimeCache(path)
        # A context knows nothing of this engine: in a cycle, GPU memory would be freed only when Python looks for one.
        self._contexts = [
            _Context(self._new_context(profile), device, self._errors, is_capturable=profile.is_decode)
            for profile in self._profiles
        ]

    def run(self, binding: Binding) -> None:
        """See `Engine.run`. The second run of a decode step's binding is captured, and later ones replay it."""
        assert isinstance(binding, TrtBinding)
        if binding.graph is not None:
            binding.graph.launch()
        else:
            binding.graph = self._contexts[binding.profile].run(binding.tensors)

    def _bind(self, views: Mapping[str, View]) -> Binding:
        tensors = bound_tensors(views, [spec.name for spec in self.inputs])
        return TrtBinding(choose_profile(self._profiles, tensors.shapes).index, tensors)

    def _new_context(self, profile: Profile) -> Any:
        """An execution context set to `profile`, over the engine's working memory."""
        config = self._engine.create_runtime_config()
        # What TensorRT allocates by itself while it runs cannot be captured in a graph.
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None:
            # TensorRT for RTX can compile kernels for every shape that it sees, and keeps all in the runtime cache. A
            # decode step has one shape, whose kernels should be there before it is captured. A prompt or a fused
            # section may have any length: with kernels for each (LAZY) the cache would grow without bound, so these
            # take the kernels that serve all lengths.
            strategy = strategies.EAGER if profile.is_decode else strategies.NONE
            config.dynamic_shapes_kernel_specialization_strategy = strategy
            self._runtime_cache.attach(config)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise self._errors.of("cannot make an execution context")
        context.set_device_memory(self._working_memory.view().pointer, self._working_memory.shape[0])
        if not context.set_optimization_profile_async(profile.index, self.device.stream_address):
            raise self._errors.of(f"cannot choose optimisation profile {profile.index}")
        self.device.synchronize()
        return context

    def _deserialize(self) -> Any:
        self._runtime = self._trt.Runtime(self._errors.log)
        engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
        if engine is None:
            raise self._errors.of("cannot load this engine")
        return engine

    def _spec(self, name: str) -> TensorSpec:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise C2CError(f"{self._path}: {name} has the type {dtype}, which the runtime cannot bind")
        shape = tuple(self._engine.get_tensor_shape(name))
        named = tuple(size if size >= 0 else f"{name}.{axis}" for axis, size in enumerate(shape))
        return TensorSpec(name=name, dtype=_DTYPES[dtype], shape=named)

    def _profile(self, index: int, inputs: list[str]) -> Profile:
        smallest, largest = {}, {}
        for name in inputs:
            shape = tuple(self._engine.get_tensor_shape(name))
            smallest[name] = largest[name] = shape
            if min(shape) < 0:
                low, _, high = self._engine.get_tensor_profile_shape(name, index)
                smallest[name], largest[name] = tuple(low), tuple(high)
        return Profile(index, smallest, largest)


@dataclass
class TrtBinding(Binding):
    """The profile that the shapes are run in, what its context is told, and the graph once a run was captured."""

    profile: int
    tensors: BoundTensors
    graph: CudaGraph | None = None


class _Errors:
    """Makes errors of one engine's calls."""

    def __init__(self, path: Path, trt: Any) -> None:
        self.log = error_log(trt)
        self.path, self._name = path, f"{trt.__name__} {trt.__version__}"

    def of(self, what: str) -> C2CError:
        """An error that says what TensorRT does not do, with what it logged."""
        return C2CError(
            f"{self.path}: {self._name} {what}: {self.log.take() or 'it gave no reason'}\n"
            "`c2c-export doctor` says what this machine runs; `c2c-export build` builds for it"
        )


class _Context:
    """One execution context and what it was told."""

    def __init__(self, context: Any, device: CudaDevice, errors: _Errors, *, is_capturable: bool) -> None:
        self._context, self._device, self._errors = context, device, errors
        self._state = BindingState(is_capturable)

    def run(self, tensors: BoundTensors) -> CudaGraph | None:
        """Queue a run; the graph that it was captured in, if it was."""
        changes = self._state.changes(tensors)
        action = self._state.action(tensors, changes)
        for name, address in changes.addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._errors.of(f"refuses the address of {name}")
        for name, shape in changes.shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._errors.of(f"refuses the shape {shape} of {name}")
        self._state.apply(changes)
        graph = self._capture() if action == "capture" else None
        if graph is None:
            self._enqueue()
        else:
            graph.launch()
        return graph

    def _capture(self) -> CudaGraph | None:
        """The run as a graph; None where that fails, and then no other run of this context is captured either."""
        # Only TensorRT for RTX has the question.
        ask = getattr(self._context, "is_stream_capturable", None)
        if ask is not None and not ask(self._device.stream_address):
            self._never_capture("TensorRT says that it is not capturable")
            return None
        try:
            return self._device.capture(self._enqueue)
        except C2CError as error:
            self._never_capture(str(error))
            return None

    def _never_capture(self, reason: str) -> None:
        self._state.is_capturable = False
        warnings.warn(
            f"{self._errors.path}: decode steps are queued one by one, not replayed from a CUDA graph: {reason}",
            stacklevel=2,
        )

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream_address):
            raise self._errors.of("cannot run this engine")
