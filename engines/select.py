"""Choose the engine of a bundle that this machine is to run, and load its graphs.

In: a bundle, the engine and precision asked for ("auto" leaves them open), and the machine. Out: an `EngineChoice` with
its reason, devices and `Engine`s. What is left open goes on to the next engine where one cannot run or cannot be
loaded; an engine that is asked for by name is never replaced by another. Not covered: building engines, and measuring
which is faster; the order is fixed and written below.
"""

import gc
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.errors import C2CError, UsageError, reason_of
from engines.base import Device, Engine
from engines.machine import Machine, probe_machine
from engines.obstacles import record_obstacle, run_obstacle
from engines.ort.engine import CpuDevice, OrtCpuEngine
from engines.targets import TARGETS, Target, target_of
from engines.trt.header import header_problem

AUTO = "auto"
ORT_CPU, ORT_CUDA, TENSORRT, TENSORRT_RTX = "ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"

# Built and timed on the GPU itself; built for GPUs of its kind; the portable graphs; the host.
_TARGET_ORDER = (TENSORRT, TENSORRT_RTX, ORT_CUDA, ORT_CPU)
# The lesser rounding error first; quantised weights last, since only their builder knows whether they are good enough.
_PRECISION_ORDER = ("fp16", "bf16", "fp32", "int8", "int4")
_QUANTISED = frozenset({"int8", "int4"})

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class EngineChoice:
    """The engine that was chosen, and why."""

    target: str
    precision: str
    record: EngineRecord
    reason: str


def open_engine(
    bundle: Bundle,
    engine: str,
    precision: str | None,
    load: Callable[[EngineRecord], Loaded],
    *,
    probe: Callable[[Iterable[str]], Machine] = probe_machine,
) -> tuple[EngineChoice, Loaded]:
    """The engine of `bundle` to run, and what `load` made of it.

    `engine` is a target or "auto", `precision` a precision or "auto"; without one it is "fp32" for a named target that
    has it, else "auto". Where either is "auto", an engine that cannot run here or whose `load` raises `C2CError` gives
    way to the next; what the failed `load` held is freed before. Raises `UsageError` when the bundle has no such
    engine, `C2CError` when it has but none of them can run on this machine; where both are named, what `load` raises.
    `probe` looks at the machine, given the modules that matter; it is called only for engines on GPUs.
    """
    wanted = wanted_engines(bundle, engine, precision)
    judge = _Judge(bundle, probe)
    obstacles: dict[str, list[str]] = {}
    for record in wanted:
        name = f"{record.target} in {record.precision}"
        obstacle = judge.obstacle(record)
        if obstacle is None:
            try:
                loaded = load(record)
            except C2CError as error:
                if AUTO not in (engine, _precision_of(engine, precision)):
                    raise
                obstacle = reason_of(error)
            else:
                reason = _reason(record, len(wanted), obstacles)
                return EngineChoice(record.target, record.precision, record, reason), loaded
            # The error is gone, and with it the frames that held what was loaded; the rest may hang in cycles.
            gc.collect()
        obstacles.setdefault(obstacle, []).append(name)
    raise C2CError(f"{bundle.root}: no engine that was asked for can run here: {_listed(obstacles)}")


def why_not_here(
    bundle: Bundle, record: EngineRecord, *, probe: Callable[[Iterable[str]], Machine] = probe_machine
) -> str | None:
    """Why this machine cannot run that engine of the bundle, as far as can be told without loading it; else None."""
    return _Judge(bundle, probe).obstacle(record)


def portable_on_cuda(bundle: Bundle) -> EngineRecord:
    """The engine that needs no building: ONNX Runtime runs the portable graphs themselves on a GPU."""
    portable = {name: graph.path for name, graph in bundle.manifest.graphs.items()}
    return EngineRecord(target=ORT_CUDA, precision="fp32", graphs=portable)


def new_device(target: str) -> Device:
    """The memory that engines of `target` work on, with a queue of its own.

    Raises `C2CError` when the target needs a GPU and there is none.
    """
    if target == ORT_CPU:
        return CpuDevice()
    try:
        from engines.cuda import CudaDevice
    except ImportError as error:
        raise C2CError(f"{target} needs cuda-python ({error}); install it with: pip install cuda-python") from error
    return CudaDevice()


def load_engine(
    target: str, path: Path, device: Device, num_threads: int | None, weights_folder: Path | None = None
) -> Engine:
    """Load a graph's file at `path` for `target` on `device`; `num_threads` and `weights_folder` are for the CPU.

    Raises `C2CError` naming the file when it cannot be loaded.
    """
    if target == ORT_CPU:
        return OrtCpuEngine(path, num_threads, device, weights_folder)
    from engines.cuda import CudaDevice

    assert isinstance(device, CudaDevice)
    if target == ORT_CUDA:
        from engines.ort.cuda import OrtCudaEngine

        return OrtCudaEngine(path, device)
    from engines.trt.engine import TrtEngine

    return TrtEngine(path, importlib.import_module(target_of(target).module), device)


class _Judge:
    """Says of a bundle's engines why they cannot run; looks at the machine once, and only when it matters."""

    def __init__(self, bundle: Bundle, probe: Callable[[Iterable[str]], Machine]) -> None:
        self._bundle, self._probe = bundle, probe
        self._machine: Machine | None = None

    def obstacle(self, record: EngineRecord) -> str | None:
        if record.target == ORT_CPU:
            return None  # this process has loaded ONNX Runtime already
        target, machine = target_of(record.target), self._look()
        return (
            run_obstacle(target, machine, record.precision)
            or record_obstacle(record, target, machine)
            or self._file_obstacle(record, target)
        )

    def _file_obstacle(self, record: EngineRecord, target: Target) -> str | None:
        # tensorrt itself can only be asked by loading the engine.
        if record.target != TENSORRT_RTX:
            return None
        return header_problem(self._bundle.file(record.graphs["receiver"]), importlib.import_module(target.module))

    def _look(self) -> Machine:
        if self._machine is None:
            built = {record.target for record in _available(self._bundle)} - {ORT_CPU, ORT_CUDA}
            self._machine = self._probe(sorted(target_of(name).module for name in built))
        return self._machine


def wanted_engines(bundle: Bundle, engine: str, precision: str | None) -> list[EngineRecord]:
    """The bundle's engines that were asked for as in `open_engine`, the best first.

    Raises `UsageError` when there are none.
    """
    precision = _precision_of(engine, precision)
    available = list(_available(bundle))
    wanted = [
        record for record in available if engine in (AUTO, record.target) and precision in (AUTO, record.precision)
    ]
    if not wanted:
        listed = ", ".join(dict.fromkeys(f"{record.target}-{record.precision}" for record in available))
        asked_for = (
            "engine" + (f" {engine}" if engine != AUTO else "") + (f" in {precision}" if precision != AUTO else "")
        )
        raise UsageError(f"{bundle.root} has no {asked_for}; it has {listed}")
    return sorted(wanted, key=_rank)


def _precision_of(engine: str, precision: str | None) -> str:
    has_float32 = engine not in TARGETS or "fp32" in TARGETS[engine].precisions
    return precision or ("fp32" if engine != AUTO and has_float32 else AUTO)


def _available(bundle: Bundle) -> Iterator[EngineRecord]:
    engines = bundle.manifest.engines.values()
    yield from engines
    portable = portable_on_cuda(bundle)
    # It has a record of its own once it was checked.
    if not any((engine.target, engine.precision) == (portable.target, portable.precision) for engine in engines):
        yield portable


def _rank(record: EngineRecord) -> tuple[bool, bool, int, int]:
    """A GPU before the host, unquantised weights before quantised ones, then the orders above."""
    return (
        record.target == ORT_CPU,
        record.precision in _QUANTISED,
        _TARGET_ORDER.index(record.target),
        _PRECISION_ORDER.index(record.precision),
    )


def _reason(record: EngineRecord, num_wanted: int, obstacles: Mapping[str, Sequence[str]]) -> str:
    name = f"{record.target} in {record.precision}"
    if obstacles:
        return f"{name}, as what would be better cannot run here: {_listed(obstacles)}"
    return f"{name}, the best of {num_wanted} that were left open" if num_wanted > 1 else f"{name}, as asked for"


def _listed(obstacles: Mapping[str, Sequence[str]]) -> str:
    """Each obstacle once, with the engines that it is in the way of."""
    return "; ".join(f"{', '.join(names)}: {obstacle}" for obstacle, names in obstacles.items())
