"""Whether an engine file of TensorRT for RTX can run on this machine, read from its first bytes.

In: an engine file and the module `tensorrt_rtx`. Out: why it cannot, or None. Not covered: engines of `tensorrt`, whose
module has no such question; loading them says it.
"""

from pathlib import Path
from typing import Any

_MEANINGS = {
    "VERSION_MISMATCH": "it was built with another version of TensorRT for RTX",
    "UNSUPPORTED_CC": "it was not built for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "it is damaged, or no engine of TensorRT for RTX",
    "CUDA_ERROR": "the CUDA driver or runtime is not installed correctly",
}


def header_problem(path: Path, trt: Any) -> str | None:
    """Why the engine at `path` cannot run here, or None; `trt` is the module `tensorrt_rtx`.

    What TensorRT calls suboptimal, an engine that runs here but was tuned for something else, counts as fine.
    """
    # A machine without a GPU makes TensorRT complain on stderr, besides its answer.
    runtime = trt.Runtime(trt.Logger(min_severity=trt.ILogger.Severity.INTERNAL_ERROR))
    with path.open("rb") as file:
        header = file.read(runtime.engine_header_size)
    validity, diagnostics = runtime.get_engine_validity(header)
    if validity != trt.EngineValidity.INVALID:
        return None
    known = {name: int(flag) for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()}
    return meaning_of(int(diagnostics), known)


def meaning_of(diagnostics: int, known: dict[str, int]) -> str:
    """The reasons whose flags are set in `diagnostics`; `known` holds TensorRT's flags by name."""
    set_flags = [name for name, flag in known.items() if diagnostics & flag]
    reasons = [_MEANINGS.get(name, name.lower().replace("_", " ")) for name in set_flags]
    return ", ".join(reasons) or "TensorRT finds it invalid here and gives no reason"
