"""Run engines built with TensorRT or TensorRT for RTX: addresses set once, decode steps replayed from CUDA graphs.

In: an engine file, the module that built it, and a GPU with its stream. Out: an `Engine`. What an execution context has
to be told is computed in `engines.trt.bindings`, which is tested; what is in this file only calls TensorRT, and beyond
reading a file has never been executed on a GPU (docs/gpu.md).

Not covered: building (`engines.trt.build`), and inputs that TensorRT wants in host memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from c2c_export.bundle import TensorSpec
from c2c_export.errors import C2CError
from engines.base import BFLOAT16, Engine, View
from engines.cuda import CudaDevice, CudaGraph
from engines.trt.bindings import BindingState, Key, Profile, check_addresses, choose_profile, key_of
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

    def __init__(self, path: Path, trt: Any, device: CudaDevice) -> None:
        """Load the engine file at `path` with the module `trt` (`tensorrt` or `tensorrt_rtx`).

        Raises `C2CError` naming the file when it was built for another version or GPU, or does not fit into memory.
        """
        self._path, self._trt, self.device = path, trt, device
        self._log = error_log(trt)
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
        self._aliases = {name: source for name, source in aliases.items() if source}
        self._profiles = [self._profile(index, inputs) for index in range(self._engine.num_optimization_profiles)]
        # The contexts never run at the same time, so one working memory serves them all.
        sizes = [self._engine.get_device_memory_size_for_profile_v2(profile.index) for profile in self._profiles]
        self._working_memory = device.allocate((max(sizes),), "uint8")
        self._runtime_cache = RuntimeCache(path)
        self._contexts = [_Context(self, profile) for profile in self._profiles]
        self._graphs: dict[Key, CudaGraph] = {}

    @property
    def input_names(self) -> tuple[str, ...]:
        """The graph's inputs."""
        return tuple(spec.name for spec in self.inputs)

    def new_context(self, profile: Profile) -> Any:
        """An execution context set to `profile`, over the engine's working memory."""
        config = self._engine.create_runtime_config()
        # What TensorRT allocates by itself while it runs cannot be captured in a graph.
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None:
            # TensorRT for RTX compiles kernels when it sees a shape. A decode step has one shape, whose best kernels
            # should be there before it is captured; a prompt's length may never come again.
            strategy = strategies.EAGER if profile.is_decode else strategies.LAZY
            config.dynamic_shapes_kernel_specialization_strategy = strategy
            self._runtime_cache.attach(config)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise self.error("cannot make an execution context")
        context.set_device_memory(self._working_memory.view().pointer, self._working_memory.shape[0])
        if not context.set_optimization_profile_async(profile.index, self.device.stream_address):
            raise self.error(f"cannot choose optimisation profile {profile.index}")
        self.device.synchronize()
        return context

    def error(self, what: str) -> C2CError:
        """An error of TensorRT, with what it logged."""
        logged = self._log.take()
        return C2CError(
            f"{self._path}: {self._trt.__name__} {self._trt.__version__} {what}: {logged or 'it gave no reason'}\n"
            "`c2c-export doctor` says what this machine runs; `c2c-export build` builds for it"
        )

    def _run(self, bindings: Mapping[str, View]) -> None:
        key = key_of(bindings)
        if key in self._graphs:
            self._graphs[key].launch()
            return
        check_addresses(bindings, self._aliases)
        profile = choose_profile(self._profiles, {name: bindings[name].shape for name in self.input_names})
        captured = self._contexts[profile.index].run(key, bindings)
        if captured is not None:
            self._graphs[key] = captured

    def _deserialize(self) -> Any:
        self._runtime = self._trt.Runtime(self._log)
        engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
        if engine is None:
            raise self.error("cannot load this engine")
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


class _Context:
    """One execution context and what it was told."""

    def __init__(self, engine: TrtEngine, profile: Profile) -> None:
        self._engine = engine
        self._context = engine.new_context(profile)
        self._state = BindingState(engine.input_names, is_capturable=profile.is_decode)

    def run(self, key: Key, bindings: Mapping[str, View]) -> CudaGraph | None:
        """Queue a run; the graph that it was captured in, if it was."""
        changes = self._state.changes(bindings)
        action = self._state.action(key, changes)
        for name, address in changes.addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._engine.error(f"refuses the address of {name}")
        for name, shape in changes.shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._engine.error(f"refuses the shape {shape} of {name}")
        self._state.apply(changes)
        if action == "capture" and self._can_be_captured():
            graph = self._engine.device.capture(self._enqueue)
            graph.launch()
            return graph
        self._enqueue()
        return None

    def _can_be_captured(self) -> bool:
        # Only TensorRT for RTX has the question: its kernels may still be being compiled.
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._engine.device.stream_address))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._engine.device.stream_address):
            raise self._engine.error("cannot run this engine")
