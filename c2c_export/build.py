"""`c2c-export build`: a bundle in, the same bundle with engines for one target and precision out.

The order is: everything that can be refused is refused before any work, by the table in `engines.targets`; then each
portable graph is quantised and retyped (`engines.quantize`, `engines.precision`), saved beside the bundle's files and
built; then the finished folder `engines/<target>-<precision>[-<arch>]/` is renamed into place and the manifest
replaced. A failure or Ctrl-C leaves the bundle as it was, but for a rebuilt engine, whose predecessor may be gone. The
lowered graphs are kept only where a folder for them is named; for ONNX Runtime they are the engine.
"""

import importlib
import importlib.metadata
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from c2c_export import __version__
from c2c_export.bundle import (
    BuildRecord,
    BuiltGraphRecord,
    Bundle,
    EngineRecord,
    GraphRecord,
    Manifest,
    ProfileRecord,
    hash_folder,
    read_manifest,
    write_manifest,
)
from c2c_export.cache import cache_folder
from c2c_export.errors import C2CError, UsageError
from engines.machine import Machine, probe_machine
from engines.obstacles import LOWERING_MODULES, build_obstacle
from engines.precision import lower_precision
from engines.quantize import quantize_weights
from engines.targets import Target, capability_number, target_of
from engines.trt.build import BuildProgress, EngineOptions, build_engine, decoder_profiles, fuser_profiles

Step = Callable[[str], AbstractContextManager[object]]
"""Called with a description; the work that it describes is done inside the returned context."""

_DEFAULT_OPTIMUM = 512
_LOW_PRECISION_SHARE = 0.5
"""Size of a lowered graph in that of the float32 graph, at most."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build. A None optimum is the smaller of 512 and the capacity."""

    bundle: Path
    target: str
    precision: str
    max_batch: int = 8
    """Requests that one decode step serves at most."""
    compute_capabilities: Sequence[str] = ()
    """GPUs to build for, such as "8.9"; empty for the target's default."""
    prefill_optimum: int | None = None
    """Prompt tokens that kernels are chosen for."""
    fuse_optimum: int | None = None
    """Fused tokens, likewise."""
    keep_onnx: Path | None = None
    """A folder to keep the lowered graphs in."""
    timing_cache: Path | None = None
    """TensorRT's measurements of kernels, read and updated, only for a target that measures them. None takes a file per
    version and GPU in the cache folder."""
    rebuild: bool = False
    """Build even if nothing changed."""


@dataclass(frozen=True)
class BuildResult:
    """The engine's name in the manifest and its record. `built` is False where it was there already."""

    name: str
    record: EngineRecord
    built: bool


@dataclass(frozen=True)
class LoweredGraph:
    """A graph in the precision that an engine is built from."""

    model: ir.Model
    quantized_weights: int
    casts: int


def build(options: BuildOptions, step: Step, progress: BuildProgress) -> BuildResult:
    """Build every graph of a bundle for one target and precision, and add the engine to the manifest.

    Raises `UsageError` for what the target cannot do and `C2CError` for what failed or what the machine lacks, and
    passes on `KeyboardInterrupt`.
    """
    target = target_of(options.target)
    _check_options(options, target)
    with step("Reading the bundle"):
        bundle = Bundle.open(options.bundle)
    manifest = bundle.manifest
    _check_pair(options, target, manifest)
    machine = _check_machine(target)
    plan = _plan(options, target, bundle)
    previous = manifest.engines.get(plan.name)
    if previous is not None and not options.rebuild and plan.equals(previous):
        return BuildResult(plan.name, previous, built=False)
    _check_disk(plan, bundle)
    staging = Path(tempfile.mkdtemp(prefix=f".{plan.name}.partial-", dir=bundle.root))
    try:
        timing_cache = options.timing_cache or _timing_cache(target, plan, machine)
        record = _build_graphs(plan, bundle, staging, options.keep_onnx, timing_cache, step, progress)
        with step("Hashing the engines"):
            _add_to_bundle(bundle.root, plan.name, record, staging)
    except OSError as error:
        full = shutil.disk_usage(bundle.root).free < 2**20
        reason = "the disk is full" if full else str(error)
        raise C2CError(f"{bundle.root}: writing the engines failed: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return BuildResult(plan.name, record, built=True)


def lower(path: Path, precision: str, *, is_fuser: bool) -> LoweredGraph:
    """The portable graph at `path` in "fp16" or "bf16", or with "int8" or "int4" weights and the rest in fp16."""
    model = ir.load(path)
    quantized = 0
    if precision in ("int8", "int4"):
        quantized = quantize_weights(model, "int8" if precision == "int8" else "int4")
        precision = "fp16"
    return LoweredGraph(model, quantized, lower_precision(model, precision, keep_sigmoid=is_fuser))


@dataclass(frozen=True)
class _Plan:
    """What a build depends on."""

    name: str
    target: str
    precision: str
    graphs: dict[str, GraphRecord]
    compute_capabilities: tuple[str, ...]
    max_batch: int
    prefill_optimum: int
    fuse_optimum: int
    versions: dict[str, str]
    sources: dict[str, str]

    def equals(self, record: EngineRecord) -> bool:
        """Whether `record` is of an engine that this plan would build again."""
        done = record.build
        if done is None or done.graphs.keys() != self.graphs.keys():
            return False
        settings = ("compute_capabilities", "max_batch", "prefill_optimum", "fuse_optimum", "versions", "sources")
        return all(getattr(done, name) == getattr(self, name) for name in settings)

    def profiles(self, name: str, capacity: int) -> tuple[ProfileRecord, ...]:
        """The profiles of one of the graphs."""
        inputs = self.graphs[name].inputs
        if name.startswith("fuser"):
            return fuser_profiles(inputs, capacity=capacity, optimum=self.fuse_optimum)
        return decoder_profiles(
            inputs, capacity=capacity, max_batch=self.max_batch, prefill_optimum=self.prefill_optimum
        )


def _check_options(options: BuildOptions, target: Target) -> None:
    if not target.builds:
        raise UsageError(f"{target.name} runs the portable graphs as they are; there is nothing to build")
    if _is_onnx_runtime(target) and options.precision == "fp32":
        raise UsageError(f"{target.name} in fp32 runs the portable graphs as they are; there is nothing to build")
    if options.max_batch < 1:
        raise UsageError(f"--max-batch {options.max_batch}: expected at least 1")
    for capability in options.compute_capabilities:
        capability_number(capability)
    refusal = target.refusal(options.precision, compute_capabilities=options.compute_capabilities)
    if refusal is not None:
        raise UsageError(refusal)
    if options.timing_cache is not None and not target.needs_gpu_to_build:
        raise UsageError(
            f"--timing-cache: {target.name} times no kernels when it builds; what it compiles on the GPU is cached "
            "when the engine runs"
        )
    if options.keep_onnx is not None and options.keep_onnx.exists() and not options.keep_onnx.is_dir():
        raise UsageError(f"--keep-onnx {options.keep_onnx}: exists and is not a folder")


def _check_pair(options: BuildOptions, target: Target, manifest: Manifest) -> None:
    """Refuse what the table of targets says that this target cannot do."""
    for flag, optimum in (("--prefill-optimum", options.prefill_optimum), ("--fuse-optimum", options.fuse_optimum)):
        if optimum is not None and not 1 <= optimum <= manifest.max_length:
            raise UsageError(f"{flag} {optimum}: expected 1 to {manifest.max_length}, the bundle's capacity")
    models = {"receiver": manifest.receiver}
    models |= {f"sharer {number}": sharer.model for number, sharer in enumerate(manifest.sharers)}
    for name, model in models.items():
        refusal = target.refusal(options.precision, head_sizes=[model.head_dim], capacity=manifest.max_length)
        if refusal is not None:
            raise UsageError(f"{options.bundle}: {name} ({model.architecture}): {refusal}")


def _check_machine(target: Target) -> Machine:
    """Refuse where the target's module or GPU is missing."""
    machine = probe_machine([target.module, *LOWERING_MODULES])
    obstacle = build_obstacle(target, machine)
    if obstacle is not None:
        hint = "\nIt builds on the machine whose GPU it will run on; --engine tensorrt-rtx builds on any machine"
        raise C2CError(f"{target.name} cannot be built here: {obstacle}{hint if target.needs_gpu_to_build else ''}")
    return machine


def _timing_cache(target: Target, plan: _Plan, machine: Machine) -> Path | None:
    if not target.needs_gpu_to_build:
        return None
    gpu = re.sub(r"\W+", "-", machine.gpus[0].name)
    return cache_folder() / "timing" / f"{target.name}-{plan.versions[target.module]}-{gpu}.cache"


def _is_onnx_runtime(target: Target) -> bool:
    return target.module == "onnxruntime"


def _plan(options: BuildOptions, target: Target, bundle: Bundle) -> _Plan:
    manifest = bundle.manifest
    graphs = {"receiver": manifest.receiver_graph}
    for number, sharer in enumerate(manifest.sharers):
        if sharer.sharer_graph is not None and sharer.fuser_graph is not None:
            graphs |= {f"sharer{number}": sharer.sharer_graph, f"fuser{number}": sharer.fuser_graph}
    paths = {path for graph in graphs.values() for path in (graph.path, f"{graph.path}.data")}
    capabilities = tuple(sorted(set(options.compute_capabilities), key=capability_number))
    arch = "+".join(f"sm{capability_number(capability)}" for capability in capabilities)
    versions = {"c2c-export": __version__, "onnx_ir": importlib.metadata.version("onnx_ir")}
    if not _is_onnx_runtime(target):
        versions[target.module] = str(importlib.import_module(target.module).__version__)
    default = min(_DEFAULT_OPTIMUM, manifest.max_length)
    return _Plan(
        name=f"{target.name}-{options.precision}" + (f"-{arch}" if arch else ""),
        target=target.name,
        precision=options.precision,
        graphs=graphs,
        compute_capabilities=capabilities,
        max_batch=options.max_batch,
        prefill_optimum=options.prefill_optimum or default,
        fuse_optimum=options.fuse_optimum or default,
        versions=versions,
        sources={path: manifest.files[path] for path in sorted(paths & manifest.files.keys())},
    )


def _check_disk(plan: _Plan, bundle: Bundle) -> None:
    """Refuse where the disk cannot hold the engines and, meanwhile, the largest lowered graph."""
    sizes = [graph.num_bytes for graph in plan.graphs.values()]
    needed = int((sum(sizes) + max(sizes)) * _LOW_PRECISION_SHARE)
    free = shutil.disk_usage(bundle.root).free
    if needed > free:
        raise C2CError(
            f"{bundle.root}: the disk is full: building {plan.name} takes about {needed / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free; nothing was written"
        )


def _build_graphs(
    plan: _Plan,
    bundle: Bundle,
    staging: Path,
    keep_onnx: Path | None,
    timing_cache: Path | None,
    step: Step,
    progress: BuildProgress,
) -> EngineRecord:
    """Build every graph into `staging`, which holds nothing but the engine's files afterwards."""
    built: dict[str, BuiltGraphRecord] = {}
    files: dict[str, str] = {}
    flags: tuple[str, ...] = ()
    target = target_of(plan.target)
    for name, graph in plan.graphs.items():
        with step(f"Lowering {name} to {plan.precision}"):
            lowered = lower(bundle.file(graph.path), plan.precision, is_fuser=name.startswith("fuser"))
            onnx_path = _save(lowered.model, name, staging, keep_onnx)
        if _is_onnx_runtime(target):
            files[name] = onnx_path.name
            built[name] = _ort_record(lowered, onnx_path)
            continue
        with step(f"Building {name} with {target.name}"):
            result = build_engine(
                importlib.import_module(target.module),
                onnx_path,
                staging / f"{name}.engine",
                EngineOptions(
                    plan.profiles(name, bundle.manifest.max_length),
                    plan.compute_capabilities,
                    single_attention_kernels=_has_single_kernels(target, lowered.model, bundle.manifest.max_length),
                    timing_cache=timing_cache,
                ),
                progress,
            )
        for path in (onnx_path, _weights_of(onnx_path)):
            path.unlink(missing_ok=True)
        flags = result.flags
        files[name] = f"{name}.engine"
        built[name] = BuiltGraphRecord(
            num_bytes=result.num_bytes,
            seconds=round(result.seconds, 3),
            quantized_weights=lowered.quantized_weights,
            casts=lowered.casts,
            layers={
                "attention": result.layers.attention,
                "cache_updates": result.layers.cache_updates,
                "rotary": result.layers.rotary,
                "total": result.layers.total,
            },
            single_attention_kernels=result.single_attention_kernels,
            cache_aliases=result.cache_aliases,
            profiles=plan.profiles(name, bundle.manifest.max_length),
        )
    return EngineRecord(
        target=plan.target,
        precision=plan.precision,
        graphs={name: f"engines/{plan.name}/{file}" for name, file in files.items()},
        build=BuildRecord(
            compute_capabilities=plan.compute_capabilities,
            max_batch=plan.max_batch,
            prefill_optimum=plan.prefill_optimum,
            fuse_optimum=plan.fuse_optimum,
            flags=flags,
            versions=plan.versions,
            sources=plan.sources,
            graphs=built,
        ),
    )


def _save(model: ir.Model, name: str, staging: Path, keep: Path | None) -> Path:
    """Write a lowered graph into `staging`, its weights beside it, and a copy of both into `keep`."""
    path = staging / f"{name}.onnx"
    ir.save(model, path, external_data=_weights_of(path).name)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for file in (path, _weights_of(path)):
            shutil.copy2(file, keep / file.name)
    return path


def _weights_of(onnx_path: Path) -> Path:
    return onnx_path.with_name(f"{onnx_path.name}.data")


def _ort_record(lowered: LoweredGraph, onnx_path: Path) -> BuiltGraphRecord:
    return BuiltGraphRecord(
        num_bytes=sum(path.stat().st_size for path in (onnx_path, _weights_of(onnx_path))),
        seconds=0.0,
        quantized_weights=lowered.quantized_weights,
        casts=lowered.casts,
        layers={},
        single_attention_kernels=True,
        cache_aliases={},
        profiles=(),
    )


def _has_single_kernels(target: Target, model: ir.Model, capacity: int) -> bool:
    """Whether every attention of the graph has a kernel of its own, as far as the table of targets knows."""
    fused = target.fused_attention
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    return fused is not None and all(
        fused.covers(num_query_heads=_size(node.inputs[0], 1), head_size=_size(node.inputs[1], 3), capacity=capacity)
        for node in attentions
    )


def _size(value: Any, axis: int) -> int:
    assert value is not None
    assert value.shape is not None
    return int(value.shape[axis])


def _add_to_bundle(root: Path, name: str, record: EngineRecord, staging: Path) -> None:
    """Rename `staging` to the engine's folder and put the engine into the manifest.

    The manifest names the engine only while its files are in place, so the bundle is whole at any moment.
    """
    folder = root / "engines" / name
    prefix = f"engines/{name}/"
    hashes = {prefix + path: digest for path, digest in hash_folder(staging).items()}
    staging.chmod(0o755)
    manifest = read_manifest(root)  # another build may have added its engine meanwhile
    others = {path: digest for path, digest in manifest.files.items() if not path.startswith(prefix)}
    engines = {key: value for key, value in manifest.engines.items() if key != name}
    if name in manifest.engines:
        write_manifest(root, manifest.model_copy(update={"engines": engines, "files": others}))
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    staging.rename(folder)
    added = {"engines": {**engines, name: record}, "files": {**others, **hashes}}
    write_manifest(root, manifest.model_copy(update=added))
