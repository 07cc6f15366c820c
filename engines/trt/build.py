"""Build one TensorRT engine from one lowered ONNX graph.

In: the module `tensorrt` or `tensorrt_rtx`, a strongly typed ONNX file (weights beside it, of any size), profiles and
compute capabilities. Out: an engine file, written beside its place and renamed into it, and what was found in the
network (`engines.trt.network`).

The build runs in a thread of its own, so that Ctrl-C reaches this one and stops TensorRT after its current step;
nothing is left behind then. TensorRT for RTX needs no GPU and keeps no timing cache: what it compiles when an engine
first runs on a GPU goes into a runtime cache (`engines.trt.runtime_cache`). Not covered: plugins, refitting, INT8
calibration, and TensorRT's choices between tactics.
"""

import concurrent.futures
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import onnx_ir as ir

from c2c_export.atomic_file import write_atomically
from c2c_export.bundle import LayerCounts, ProfileRecord, ProfileSizes, TensorSpec
from c2c_export.errors import C2CError
from engines.targets import capability_number
from engines.trt.log import error_log
from engines.trt.network import (
    GraphNames,
    Parsed,
    allow_several_attention_kernels,
    cache_aliases,
    check,
    expected_layers,
    head_sizes,
    parse,
    shorten,
)

_REGULAR_HEAD_SIZE = 8
_NO_SINGLE_KERNEL = "not supported by a dedicated kernel"
_POLL_SECONDS = 0.1

Result = TypeVar("Result")


class BuildProgress(Protocol):
    """Is told how a build goes, from any thread. Phases have a name and may lie within another one, their parent."""

    def phase_started(self, phase: str, parent: str | None, num_steps: int) -> None:
        """A phase of `num_steps` steps begins."""

    def step_finished(self, phase: str, step: int) -> None:
        """Step number `step`, from 0, of a phase is done."""

    def phase_finished(self, phase: str) -> None:
        """A phase is over, perhaps before all its steps were reported."""

    def stopping(self) -> None:
        """The build was interrupted, and ends when TensorRT has finished its current step."""


@dataclass(frozen=True)
class EngineOptions:
    """How to build. `compute_capabilities` ("8.9") is for TensorRT for RTX; empty takes its default, 8.0 and later."""

    profiles: Sequence[ProfileRecord]
    compute_capabilities: Sequence[str] = ()
    single_attention_kernels: bool = True
    """Expect a kernel of its own for every attention; where there turns out to be none, several are allowed."""
    timing_cache: Path | None = None
    """A file that is read if it exists, and written after the build; for `tensorrt` only."""


@dataclass(frozen=True)
class BuiltEngine:
    """What was built. `cache_aliases` names the input whose memory an output shares, by output."""

    num_bytes: int
    layers: LayerCounts
    cache_aliases: dict[str, str]
    single_attention_kernels: bool
    flags: tuple[str, ...]
    """The builder flags that were set, by TensorRT's names."""


def decoder_profiles(inputs: Sequence[TensorSpec], capacity: int, sizes: ProfileSizes) -> tuple[ProfileRecord, ...]:
    """Profile 0, prefill: B = 1, S from 1 to `capacity`; profile 1, decode: B from 1 to `max_batch`, S = 1."""
    return (
        _profile("prefill", inputs, {"batch": (1, 1, 1), "tokens": (1, sizes.prefill_optimum, capacity)}),
        _profile("decode", inputs, {"batch": (1, sizes.decode_optimum, sizes.max_batch), "tokens": (1, 1, 1)}),
    )


def fuser_profiles(inputs: Sequence[TensorSpec], capacity: int, sizes: ProfileSizes) -> tuple[ProfileRecord, ...]:
    """One profile, N from 1 to `capacity`."""
    return (_profile("fuse", inputs, {"fused_tokens": (1, sizes.fuse_optimum, capacity)}),)


def build_engine(
    trt: Any, onnx_path: Path, output_path: Path, options: EngineOptions, progress: BuildProgress
) -> BuiltEngine:
    """Build `onnx_path` and write the engine to `output_path`, which appears only when it is complete.

    Raises `C2CError` naming the ONNX node and the model's layer that failed, or what the disk lacks, and passes on
    `KeyboardInterrupt`.
    """
    model = ir.load(onnx_path)
    job = _Job(trt, onnx_path, options, progress, model)
    del model
    serialized, single_kernels = _interruptible(job.run, job.cancel)
    _write(output_path, serialized)
    if job.timing_cache is not None and options.timing_cache is not None:
        _write(options.timing_cache, job.timing_cache)
    return BuiltEngine(
        num_bytes=serialized.nbytes,
        layers=job.layers,
        cache_aliases=job.aliases,
        single_attention_kernels=single_kernels,
        flags=job.flags,
    )


class _Job:
    """One build, run in a thread."""

    layers: LayerCounts
    aliases: dict[str, str]

    def __init__(
        self,
        trt: Any,
        path: Path,
        options: EngineOptions,
        progress: BuildProgress,
        model: ir.Model,
    ) -> None:
        self._trt, self._path, self._options = trt, path, options
        self._names, self._expected = GraphNames(model), expected_layers(model)
        self._odd_head_sizes = sorted({size for size in head_sizes(model) if size % _REGULAR_HEAD_SIZE})
        self._progress, self._cancelled = progress, threading.Event()
        self.timing_cache: Any = None
        self.flags: tuple[str, ...] = ()
        self._log = error_log(trt)
        self._monitor = _monitor(trt, progress, self._cancelled)

    def cancel(self) -> None:
        """End `run` after TensorRT's current step, which can take some seconds."""
        self._cancelled.set()
        self._progress.stopping()

    def run(self) -> tuple[Any, bool]:
        """The serialised engine, and whether every attention has a kernel of its own."""
        builder = self._trt.Builder(self._log)
        single = self._options.single_attention_kernels
        serialized, reason = self._build(builder, single)
        if serialized is None and single and _NO_SINGLE_KERNEL in reason:
            single = False
            serialized, reason = self._build(builder, single)
        if serialized is None:
            raise self._failure(reason)
        return serialized, single

    def _build(self, builder: Any, single_kernels: bool) -> tuple[Any, str]:
        parsed = parse(self._trt, builder, self._log, self._path, self._names)
        self.layers = check(self._trt, parsed.network, self._expected, self._path.name)
        self.aliases = cache_aliases(self._trt, parsed.network)
        if not single_kernels:
            allow_several_attention_kernels(self._trt, parsed.network)
        config = self._configure(builder, parsed)
        serialized = builder.build_serialized_network(parsed.network, config)
        if serialized is not None and self._options.timing_cache is not None:
            self.timing_cache = config.get_timing_cache().serialize()
        return serialized, self._log.take()

    def _configure(self, builder: Any, parsed: Parsed) -> Any:
        trt, config = self._trt, builder.create_builder_config()
        config.progress_monitor = self._monitor
        # What a graph keeps in float32 is to be computed in float32, not in TensorFloat-32's 11 bits.
        config.clear_flag(trt.BuilderFlag.TF32)
        # Without it TensorRT for RTX may allocate while it runs, which a CUDA graph cannot hold.
        flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if flag is not None:
            config.set_flag(flag)
        self.flags = tuple(name for name, value in trt.BuilderFlag.__members__.items() if config.get_flag(value))
        if self._options.compute_capabilities:
            config.num_compute_capabilities = len(self._options.compute_capabilities)
            for index, capability in enumerate(self._options.compute_capabilities):
                member = getattr(trt.ComputeCapability, f"SM{capability_number(capability)}")
                if not config.set_compute_capability(member, index):
                    raise self._failure(f"compute capability {capability}: {self._log.take()}")
        if self._options.timing_cache is not None:
            known = self._options.timing_cache.read_bytes() if self._options.timing_cache.is_file() else b""
            if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
                raise C2CError(
                    f"{self._options.timing_cache}: this timing cache is of another version of TensorRT or of another "
                    "GPU; delete it, or name another one"
                )
        for record in self._options.profiles:
            profile = builder.create_optimization_profile()
            for name, (smallest, optimum, largest) in record.shapes.items():
                profile.set_shape(name, smallest, optimum, largest)
            if config.add_optimization_profile(profile) < 0:
                raise self._failure(f"profile {record.name}: {self._log.take()}")
        return config

    def _failure(self, reason: str) -> C2CError:
        nodes = self._names.mentioned(reason)
        where = f" at {self._names.describe(nodes[0])}" if nodes else ""
        if len(nodes) > 1:
            where += f" to {self._names.describe(nodes[-1])}"
        version = f"{self._trt.__name__} {self._trt.__version__}"
        cause = ""
        if self._odd_head_sizes:
            sizes = " and ".join(str(size) for size in self._odd_head_sizes)
            cause = (
                f"\nIts head size {sizes} is no multiple of 8, with which TensorRT's compiler fails in some graphs: "
                "run this pair on ort-cpu or ort-cuda"
            )
        return C2CError(
            f"{self._path.name}: {version} cannot build this graph{where}: {shorten(reason) or 'it gave no reason'}"
            f"{cause}"
        )


def _profile(name: str, inputs: Sequence[TensorSpec], sizes: dict[str, tuple[int, int, int]]) -> ProfileRecord:
    def shape(spec: TensorSpec, kind: int) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else sizes[size][kind] for size in spec.shape)

    dynamic = [spec for spec in inputs if any(isinstance(size, str) for size in spec.shape)]
    return ProfileRecord(name=name, shapes={s.name: (shape(s, 0), shape(s, 1), shape(s, 2)) for s in dynamic})


def _monitor(trt: Any, progress: BuildProgress, cancelled: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.phase_started(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step_finished(phase_name, step)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            progress.phase_finished(phase_name)

    return Monitor()


def _interruptible(work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """Do `work` in another thread; an interrupt or a signal calls `cancel`, waits for the work to stop, and goes on."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        try:
            while not future.done():
                concurrent.futures.wait([future], timeout=_POLL_SECONDS)
        except (KeyboardInterrupt, SystemExit):
            cancel()
            concurrent.futures.wait([future])
            raise
        return future.result()


def _write(path: Path, content: Any) -> None:
    """Write a buffer of TensorRT's to `path`, which holds either all of it or what it held before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if content.nbytes > free:
            raise C2CError(
                f"{path.parent}: the disk is full: {path.name} needs {content.nbytes / 1e6:.1f} MB, "
                f"{free / 1e6:.1f} MB are free; nothing was left behind"
            )
        write_atomically(path, content)
    except OSError as error:
        raise C2CError(f"{path}: cannot be written: {os.strerror(error.errno or 0)}") from error
