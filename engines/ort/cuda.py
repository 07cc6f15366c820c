"""Engines on ONNX Runtime's CUDA provider: as on the CPU, over buffers in GPU memory and on the device's own stream.

In: an ONNX graph and a GPU with its stream. Out: an `Engine`. What needs a GPU in this file has never been executed
(docs/gpu.md). Not covered: capturing runs in CUDA graphs.
"""

from collections.abc import Iterable
from pathlib import Path

import onnxruntime as ort

from c2c_export.errors import C2CError
from engines.cuda import CudaDevice
from engines.machine import CUDA_PROVIDER
from engines.ort.engine import OrtEngine

# On another provider one of these would bring a whole cache to the host and back in every step.
_CACHE_OPERATORS = frozenset({"TensorScatter", "Attention"})


class OrtCudaEngine(OrtEngine):
    """A graph on ONNX Runtime's CUDA provider."""

    device: CudaDevice

    def __init__(self, path: Path, device: CudaDevice) -> None:
        """Load the graph at `path` onto the GPU.

        Raises `C2CError` when ONNX Runtime has no CUDA provider, cannot start it, or would compute caches elsewhere.
        """
        require_provider(ort.get_available_providers())
        ort.preload_dlls()  # CUDA and cuDNN from pip's packages, where they are installed so
        options = ort.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        run_options = ort.RunOptions()
        # The stream keeps the order; waiting for it after every run would keep sharer and receiver apart.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        provider = (CUDA_PROVIDER, {"device_id": "0", "user_compute_stream": str(device.stream_address)})
        super().__init__(path, device, [provider, "CPUExecutionProvider"], options, run_options)
        # ONNX Runtime goes on without a provider whose libraries it cannot load.
        if CUDA_PROVIDER not in self._session.get_providers():
            raise C2CError(
                f"ONNX Runtime {ort.__version__} cannot start {CUDA_PROVIDER}; are CUDA and cuDNN of the versions that "
                "docs/gpu.md names installed? `c2c-export doctor` says what this machine has"
            )
        elsewhere = cache_operators_elsewhere(
            (part.ep_name, node.op_type)
            for part in self._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        )
        if elsewhere:
            raise C2CError(
                f"{path}: ONNX Runtime {ort.__version__} has no CUDA kernel for {', '.join(elsewhere)} in this graph; "
                "use a newer onnxruntime-gpu, or another engine"
            )


def require_provider(available: Iterable[str]) -> None:
    """Raise `C2CError` unless the CUDA provider is among those `available` in the installed ONNX Runtime."""
    available = list(available)
    if CUDA_PROVIDER not in available:
        raise C2CError(
            f"ONNX Runtime {ort.__version__} offers {', '.join(available)}, but ort-cuda needs {CUDA_PROVIDER}; "
            "install its GPU build with: bash scripts/install_gpu.sh"
        )


def cache_operators_elsewhere(assigned: Iterable[tuple[str, str]]) -> list[str]:
    """The operators on caches among (provider, operator) pairs that are not with the CUDA provider, sorted."""
    return sorted({operator for provider, operator in assigned if provider != CUDA_PROVIDER} & _CACHE_OPERATORS)
