"""Engines on ONNX Runtime's CUDA provider: as on the CPU, over buffers in GPU memory and on the device's own stream.

In: an ONNX graph and a GPU with its stream. Out: an `Engine`. What needs a GPU in this file has never been executed
(docs/gpu.md). Not covered: capturing runs in CUDA graphs.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path

import onnxruntime as ort

from c2c_export.errors import C2CError
from engines.base import Binding
from engines.cuda import CudaDevice
from engines.machine import CUDA_PROVIDER
from engines.ort.engine import OrtBinding, OrtEngine, bind_input

# On another provider one of these would bring a whole cache to the host and back in every step.
_CACHE_OPERATORS = frozenset({"TensorScatter", "Attention"})
_GPU_MEMORY = "Cuda"
"""ONNX Runtime's name of it."""


class OrtCudaEngine(OrtEngine):
    """A graph on ONNX Runtime's CUDA provider."""

    device: CudaDevice

    def __init__(self, path: Path, device: CudaDevice) -> None:
        """Load the graph at `path` onto the GPU.

        Raises `C2CError` when ONNX Runtime has no CUDA provider, cannot start it, or would compute caches elsewhere.
        Warns of other operators that it computes elsewhere.
        """
        require_provider(ort.get_available_providers())
        ort.preload_dlls()  # CUDA and cuDNN from pip's packages, where they are installed so
        options = ort.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        run_options = ort.RunOptions()
        # The stream keeps the order; waiting for it after every run would keep sharer and receiver apart.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        providers = [(CUDA_PROVIDER, provider_options(device.stream_address)), "CPUExecutionProvider"]
        super().__init__(path, device, providers, options, run_options)
        # ONNX Runtime goes on without a provider whose libraries it cannot load.
        if CUDA_PROVIDER not in self._session.get_providers():
            raise C2CError(
                f"ONNX Runtime {ort.__version__} cannot start {CUDA_PROVIDER}; are CUDA and cuDNN of the versions that "
                "docs/gpu.md names installed? `c2c-export doctor` says what this machine has"
            )
        caches, others = operators_elsewhere(
            (part.ep_name, node.op_type)
            for part in self._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        )
        if caches:
            raise C2CError(
                f"{path}: ONNX Runtime {ort.__version__} has no CUDA kernel for {', '.join(caches)} in this graph; "
                "use a newer onnxruntime-gpu, or another engine"
            )
        if others:
            warnings.warn(
                f"{path}: ONNX Runtime {ort.__version__} computes {', '.join(others)} on the CPU, and copies what they "
                "read and write in every run",
                stacklevel=2,
            )
        memories = zip(self.inputs, self._session.get_input_memory_infos(), strict=True)
        self._host_inputs = [spec.name for spec, memory in memories if memory.name != _GPU_MEMORY]

    def run(self, binding: Binding) -> None:
        """See `Engine.run`. Inputs that ONNX Runtime reads on the host are copied there first, which waits for them."""
        assert isinstance(binding, OrtBinding)
        if self._host_inputs:
            # ONNX Runtime copies these when they are bound, not when it runs, and without regard to the stream.
            self.device.synchronize()
            for name in self._host_inputs:
                bind_input(binding.prepared, name, binding.views[name])
        super().run(binding)


def provider_options(stream_address: int) -> dict[str, str]:
    """The CUDA provider's options for a stream; https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html."""
    return {
        "device_id": "0",
        "user_compute_stream": str(stream_address),
        # fp32 is float32; TensorFloat-32, on by default, has 11 bits.
        "use_tf32": "0",
    }


def require_provider(available: Iterable[str]) -> None:
    """Raise `C2CError` unless the CUDA provider is among those `available` in the installed ONNX Runtime."""
    available = list(available)
    if CUDA_PROVIDER not in available:
        raise C2CError(
            f"ONNX Runtime {ort.__version__} offers {', '.join(available)}, but ort-cuda needs {CUDA_PROVIDER}; "
            "install its GPU build with: bash scripts/install_gpu.sh"
        )


def operators_elsewhere(assigned: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The operators among (provider, operator) pairs that are not with the CUDA provider: on caches, and others."""
    elsewhere = {operator for provider, operator in assigned if provider != CUDA_PROVIDER}
    return sorted(elsewhere & _CACHE_OPERATORS), sorted(elsewhere - _CACHE_OPERATORS)
