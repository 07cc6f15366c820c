"""What this machine has that engines could run on: GPUs, driver, libraries.

In: the machine. Out: a `Machine`, which `engines.obstacles` judges; nothing is changed. Libraries
are imported to see that they can be. Not covered: GPUs of other makers than NVIDIA.
"""

import importlib
import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

CUDA_PYTHON = "cuda.bindings"
"""The module of the distribution cuda-python that the engines on GPUs use."""
CUDA_PROVIDER = "CUDAExecutionProvider"
"""ONNX Runtime's provider for GPUs of NVIDIA."""
_NVIDIA_SMI_FIELDS = "name,compute_cap,memory.total,driver_version"
_ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Gpu:
    """A GPU. `compute_capability` is written "8.9", `memory_bytes` is all it has."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Module:
    """A Python module: its version, or why it cannot be used."""

    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class OnnxRuntime:
    """The installed distributions of the module `onnxruntime` with their versions, and what is wrong with them."""

    distributions: dict[str, str]
    problem: str | None
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What was found. `cuda_problem` is why the GPUs, if any, cannot be used, None where they can."""

    gpus: tuple[Gpu, ...]
    cuda_problem: str | None
    driver: str | None
    """What is known of the driver: its version, and the newest CUDA version it serves."""
    modules: dict[str, Module] = field(default_factory=dict)
    onnx_runtime: OnnxRuntime = field(default_factory=lambda: OnnxRuntime({}, "not installed"))


def probe_machine(modules: Iterable[str]) -> Machine:
    """Look at this machine; `modules` are the names of the Python modules whose presence matters."""
    found = {name: probe_module(name) for name in {*modules, CUDA_PYTHON}}
    listed, listed_driver = _ask_nvidia_smi()
    if found[CUDA_PYTHON].version is None:
        reason = "no GPU: nvidia-smi lists none"
        if listed:
            reason = f"cuda-python ({CUDA_PYTHON}): {found[CUDA_PYTHON].problem}; pip install cuda-python"
        return Machine(listed, reason, listed_driver, found, _probe_onnx_runtime())
    usable, problem, served = _ask_cuda()
    driver = ", ".join(filter(None, (listed_driver, served))) or None
    return Machine(usable or listed, problem, driver, found, _probe_onnx_runtime())


def probe_module(name: str) -> Module:
    """Import a module for its version."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there may lack one that it needs.
        missing = error.name or name
        own = name == missing or name.startswith(f"{missing}.")
        return Module(None, "not installed" if own else f"cannot be imported: {missing} is missing")
    except Exception as error:  # whatever its native libraries raise
        return Module(None, f"cannot be imported: {error}")
    try:
        return Module(str(module.__version__))
    except Exception as error:  # a folder of that name is imported too, and has no version
        place = vars(module)  # not getattr, which a module may answer by itself, as it did for the version
        found = place.get("__file__") or next(iter(place.get("__path__", ())), "Python's path")
        return Module(None, f"cannot be used: what is imported from {found} has no readable __version__ ({error})")


def parse_nvidia_smi(text: str) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs and driver version from nvidia-smi's CSV of name, compute capability, memory in MiB and driver version.

    Lines of another form (a message, a GPU that does not answer) are left out.
    """
    gpus, driver = [], None
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and re.fullmatch(r"\d+\.\d+", parts[1]) and parts[2].isdigit():
            gpus.append(Gpu(parts[0], parts[1], int(parts[2]) << 20))
            driver = parts[3]
    return tuple(gpus), driver


def check_onnx_runtime(search_path: Sequence[str] | None = None) -> OnnxRuntime:
    """Which distributions of ONNX Runtime are installed, and whether they are as pip left them.

    `search_path` is where installed packages lie, by default Python's. Two of them at once, missing files and files of
    another size than recorded are problems, and the text says how to mend them.
    """
    options: dict[str, Any] = {} if search_path is None else {"path": list(search_path)}
    installed: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(**options):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name in _ONNX_RUNTIMES:
            installed.setdefault(name, distribution)
    versions = {name: installed[name].version for name in _ONNX_RUNTIMES if name in installed}
    mend = (
        "mend with: pip uninstall --yes onnxruntime onnxruntime-gpu, then pip install onnxruntime for the CPU, "
        "or bash scripts/install_gpu.sh for a GPU"
    )
    if not versions:
        return OnnxRuntime({}, "not installed; pip install onnxruntime, or bash scripts/install_gpu.sh")
    if len(versions) > 1:
        names = " and ".join(f"{name} {version}" for name, version in versions.items())
        problem = f"{names} are both installed, but are one module and overwrite each other's files; {mend}"
        return OnnxRuntime(versions, problem)
    ((name, distribution),) = installed.items()
    damaged = _damaged_files(distribution)
    if damaged:
        problem = f"{len(damaged)} files of {name} are missing or not its own, such as {damaged[0]}; {mend}"
        return OnnxRuntime(versions, problem)
    return OnnxRuntime(versions, None)


def _damaged_files(distribution: importlib.metadata.Distribution) -> list[str]:
    damaged = []
    for file in distribution.files or ():
        path = file.locate()
        # pip records no size for what it compiles itself
        if file.size is not None and not (path.is_file() and path.stat().st_size == file.size):  # type: ignore[attr-defined]
            damaged.append(str(file))
    return damaged


def _probe_onnx_runtime() -> OnnxRuntime:
    found = check_onnx_runtime()
    try:
        providers = tuple(importlib.import_module("onnxruntime").get_available_providers())
    except Exception as error:  # a clobbered installation fails in many ways
        return OnnxRuntime(found.distributions, found.problem or f"cannot be imported: {error}")
    return OnnxRuntime(found.distributions, found.problem, providers)


def _ask_nvidia_smi() -> tuple[tuple[Gpu, ...], str | None]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), None
    command = [program, f"--query-gpu={_NVIDIA_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return (), None
    return parse_nvidia_smi(done.stdout)


def _ask_cuda() -> tuple[tuple[Gpu, ...], str | None, str | None]:
    """The GPUs that this process can use, or why none; and the newest CUDA version that the driver serves."""
    cudart: Any = importlib.import_module("cuda.bindings.runtime")
    _, number = cudart.cudaDriverGetVersion()
    served = f"CUDA up to {number // 1000}.{number % 1000 // 10}" if number else None
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        driver = f"the driver serves {served}" if number else "no NVIDIA driver"
        return (), f"no GPU: {driver} (cudaGetDeviceCount: {status.name}, {text.decode()})", served
    gpus = []
    for index in range(count):
        status, properties = cudart.cudaGetDeviceProperties(index)
        if status == cudart.cudaError_t.cudaSuccess:
            capability = f"{properties.major}.{properties.minor}"
            gpus.append(Gpu(properties.name.decode(), capability, properties.totalGlobalMem))
    return tuple(gpus), None if gpus else "no GPU: CUDA lists none", served
