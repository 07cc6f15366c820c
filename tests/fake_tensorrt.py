"""TensorRT's runtime over `fake_cudart`: contexts that note what they were told when their runs are carried out.

For tests of `engines.trt.engine` where there is no GPU. Nothing is computed: `runs` holds, of every run that was
carried out, its profile, addresses and shapes, also of those that a graph replays.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from fake_cudart import FakeCudart

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


class FakeTensorRT:
    """The module with one engine: inputs, outputs as (type, shape), aliases, profiles as (smallest, largest)."""

    __name__, __version__ = "tensorrt_rtx", "1.7"
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    TensorLocation = SimpleNamespace(DEVICE="device")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="LAZY", EAGER="EAGER", NONE="NONE")

    class ILogger:
        Severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal error")

    def __init__(
        self,
        cudart: FakeCudart,
        inputs: Tensors,
        outputs: Tensors,
        aliases: Mapping[str, str],
        profiles: list[tuple[Any, Any]],
    ) -> None:
        self.cudart, self.inputs, self.outputs, self.aliases, self.profiles = cudart, inputs, outputs, aliases, profiles
        self.runs: list[tuple[int, dict[str, int], dict[str, tuple[int, ...]]]] = []
        self.configs: list[Any] = []
        self.caches: list[Any] = []
        self.kernels, self.takes_cache = b"", True
        self.is_capturable, self.fails, self.fails_in_capture = True, False, False
        self.log: Any = None

    def Runtime(self, log: Any) -> Any:
        self.log = log
        return SimpleNamespace(deserialize_cuda_engine=lambda content: FakeEngine(self))

    def new_config(self) -> Any:
        config = SimpleNamespace(create_runtime_cache=self._new_cache)

        def take(cache: Any) -> bool:
            config.cache = cache
            return self.takes_cache

        config.set_runtime_cache = take
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "allocation", strategy)
        self.configs.append(config)
        return config

    def _new_cache(self) -> Any:
        cache = SimpleNamespace(known=b"", serialize=lambda: self.kernels)
        cache.deserialize = lambda content: setattr(cache, "known", content)
        self.caches.append(cache)
        return cache


class FakeEngine:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self._tensors = {**trt.inputs, **trt.outputs}
        self.num_io_tensors, self.num_optimization_profiles = len(self._tensors), len(trt.profiles)
        self.create_runtime_config = trt.new_config

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self._trt.inputs else "output"

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self._tensors[name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple[Any, Any, Any]:
        smallest, largest = self._trt.profiles[index]
        return smallest[name], largest[name], largest[name]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._trt.aliases.get(name)

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 1000

    def create_execution_context(self, config: Any) -> "FakeContext":
        return FakeContext(self._trt)


class FakeContext:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_device_memory(self, address: int, num_bytes: int) -> None:
        assert address in self._trt.cudart.memory
        assert num_bytes == 1000

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._trt.is_capturable

    def execute_async_v3(self, stream: int) -> bool:
        trt = self._trt
        if trt.fails or (trt.fails_in_capture and trt.cudart.captured is not None):
            trt.log.log("error", "no memory today" if trt.fails else "not while capturing")
            return False
        run = (self._profile, dict(self._addresses), dict(self._shapes))
        trt.cudart.do("kernel", None, lambda: trt.runs.append(run))
        return True
