"""`c2c-export build`: a bundle in, the same bundle with engines for one target and precision out.

The order is: everything that can be refused is refused before any work (`c2c_export.build_plan`); then each portable
graph is lowered (`engines.lowering`), saved beside the bundle's files and built; then the finished folder
`engines/<target>-<precision>[-<arch>]/` is renamed into place and the manifest replaced. A failure or Ctrl-C leaves the
bundle as it was, but for a rebuilt engine, whose predecessor may be gone. The lowered graphs are kept only where a
folder for them is named; for ONNX Runtime they are the engine.
"""

import contextlib
import importlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from c2c_export.build_plan import BuildOptions, BuildPlan, check_options, plan_build
from c2c_export.bundle import (
    GRAPHS,
    BuildRecord,
    BuiltGraphRecord,
    Bundle,
    EngineRecord,
    engine_prefix,
    hash_folder,
    read_manifest,
    write_manifest,
)
from c2c_export.bundle_lock import locked
from c2c_export.cache import cache_folder
from c2c_export.errors import C2CError, UsageError
from c2c_export.progress import Step
from c2c_export.staging import is_disk_full, partial_folder
from engines.lowering import LoweredGraph, lower, save_lowered, weights_of
from engines.targets import Target, warn_of_slow_attention
from engines.trt.build import BuildProgress, BuiltEngine, EngineOptions, build_engine


@dataclass(frozen=True)
class BuildResult:
    """The engine's name in the manifest and its record. `built` is False where it was there already."""

    name: str
    record: EngineRecord
    built: bool


def build(options: BuildOptions, step: Step, progress: BuildProgress | None = None) -> BuildResult:
    """Build every graph of a bundle for one target and precision, and add the engine to the manifest.

    `progress` is told how TensorRT gets on; ONNX Runtime's engines need none. Raises `UsageError` for
    what the target cannot do and `C2CError` for what failed or what the machine lacks, and passes on
    `KeyboardInterrupt`.
    """
    check_options(options)
    with step("Reading the bundle"):
        bundle = Bundle.open(options.bundle, replacing=options.engine_name)
    manifest = bundle.manifest
    models = [manifest.receiver, *(sharer.model for sharer in manifest.sharers)]
    warn_of_slow_attention(options.target, [(model.source, model.head_dim) for model in models])
    return add_engine(bundle, options, step, progress)


def add_engine(bundle: Bundle, options: BuildOptions, step: Step, progress: BuildProgress | None = None) -> BuildResult:
    """As `build`, of a bundle that is open already; `options.bundle` names its folder."""
    plan = plan_build(options, check_options(options), bundle)
    if options.keep_onnx is not None:
        _make_folder(options.keep_onnx)  # before the work that it is to keep
    previous = bundle.manifest.engines.get(plan.name)
    if previous is not None and not options.rebuild and plan.equals(previous):
        if options.keep_onnx is not None:
            _keep_lowered(plan, bundle, options.keep_onnx, step)
        return BuildResult(plan.name, previous, built=False)
    plan.check_disk(bundle.root)
    with _staging(bundle.root, plan.name) as staging:
        record = _build_graphs(plan, bundle, staging, options, step, progress)
        with step("Hashing the engines"):
            _add_to_bundle(bundle.root, plan.name, record, staging)
    return BuildResult(plan.name, record, built=True)


@contextlib.contextmanager
def _staging(root: Path, name: str) -> Iterator[Path]:
    """A folder in the bundle that is gone in the end, unless it was renamed. `C2CError` when it cannot be written."""
    try:
        with partial_folder(root, name) as folder:
            yield folder
    except OSError as error:
        reason = "the disk is full" if is_disk_full(root) else str(error)
        raise C2CError(f"{root}: writing the engines failed: {reason}; nothing was left behind") from error


def _build_graphs(
    plan: BuildPlan, bundle: Bundle, staging: Path, options: BuildOptions, step: Step, progress: BuildProgress | None
) -> EngineRecord:
    """Build every graph into `staging`, which holds nothing but the engine's files afterwards."""
    built: dict[str, BuiltGraphRecord] = {}
    files: dict[str, str] = {}
    flags: tuple[str, ...] = ()
    for name in plan.graphs:
        started = time.perf_counter()
        onnx_path = staging / f"{name}.onnx"
        lowered = _lower(plan, bundle, name, onnx_path, options.keep_onnx, step)
        engine = None
        if not plan.target.runs_on_onnx_runtime:
            with step(f"Building {name} with {plan.target.name}"):
                engine = _build_engine(plan, name, lowered, onnx_path, options.timing_cache, progress)
            flags = engine.flags
            for path in (onnx_path, weights_of(onnx_path)):
                path.unlink(missing_ok=True)
        files[name] = onnx_path.name if engine is None else f"{name}.engine"
        built[name] = BuiltGraphRecord(
            num_bytes=sum(path.stat().st_size for path in staging.glob(f"{files[name]}*")),
            seconds=round(time.perf_counter() - started, 3),
            quantized_weights=lowered.quantized_weights,
            float_weights=lowered.float_weights,
            casts=lowered.casts,
            rules=dict(lowered.rules),
            layers=None if engine is None else engine.layers,
            single_attention_kernels=engine is None or engine.single_attention_kernels,
            cache_aliases={} if engine is None else engine.cache_aliases,
            profiles=plan.profiles(name),
        )
    return EngineRecord(
        target=plan.target.name,
        precision=plan.precision,
        graphs={name: engine_prefix(plan.name) + file for name, file in files.items()},
        weights_folder=GRAPHS if plan.shares_weights else None,
        build=BuildRecord(
            compute_capabilities=plan.compute_capabilities,
            gpu=plan.gpu,
            profile_sizes=plan.profile_sizes,
            flags=flags,
            versions=plan.versions,
            sources=plan.sources,
            graphs=built,
        ),
    )


def _lower(
    plan: BuildPlan, bundle: Bundle, name: str, onnx_path: Path, keep_onnx: Path | None, step: Step
) -> LoweredGraph:
    """Lower a graph and write it to `onnx_path`, and a copy into `keep_onnx`, if given."""
    with step(f"Lowering {name} to {plan.precision}"):
        portable = bundle.file(plan.graphs[name].path)
        lowered = lower(portable, plan.target.name, plan.precision, is_fuser=name.startswith("fuser"))
        save_lowered(lowered, onnx_path, own_weights=not plan.shares_weights)
        if keep_onnx is not None:
            _keep(onnx_path, weights_of(portable if plan.shares_weights else onnx_path), keep_onnx)
    return lowered


def _build_engine(
    plan: BuildPlan,
    name: str,
    lowered: LoweredGraph,
    onnx_path: Path,
    timing_cache: Path | None,
    progress: BuildProgress | None,
) -> BuiltEngine:
    assert progress is not None, "a target that takes minutes to build reports its progress"
    options = EngineOptions(
        plan.profiles(name),
        plan.compute_capabilities,
        single_attention_kernels=_has_single_kernels(plan.target, lowered, plan.capacity),
        timing_cache=timing_cache or _timing_cache(plan),
    )
    module = importlib.import_module(plan.target.module)
    return build_engine(module, onnx_path, onnx_path.with_suffix(".engine"), options, progress)


def _timing_cache(plan: BuildPlan) -> Path | None:
    """Where the target's kernel measurements are kept, unless the user names a file."""
    if plan.gpu is None:
        return None
    gpu = re.sub(r"\W+", "-", plan.gpu.name)
    return cache_folder() / "timing" / f"{plan.target.name}-{plan.versions[plan.target.module]}-{gpu}.cache"


def _has_single_kernels(target: Target, lowered: LoweredGraph, capacity: int) -> bool:
    """Whether every attention of the graph has a kernel of its own, as far as the table of targets knows."""
    fused = target.fused_attention
    if fused is None:
        return False
    for node in lowered.model.graph:
        if node.op_type == "Attention":
            query, key = (value.shape for value in node.inputs[:2] if value is not None)
            assert query is not None
            assert key is not None
            if not fused.covers(num_query_heads=int(query[1]), head_size=int(key[3]), capacity=capacity):
                return False
    return True


def _keep_lowered(plan: BuildPlan, bundle: Bundle, folder: Path, step: Step) -> None:
    """Lower every graph into `folder`, of an engine that need not be built."""
    with _staging(bundle.root, plan.name) as staging:
        for name in plan.graphs:
            _lower(plan, bundle, name, staging / f"{name}.onnx", folder, step)


def _keep(onnx_path: Path, weights: Path, folder: Path) -> None:
    """Copy a lowered graph and its weights into `folder`."""
    try:
        for file in (onnx_path, weights):
            shutil.copy2(file, folder / file.name)
    except OSError as error:
        raise C2CError(f"--keep-onnx {folder}: cannot be written: {error.strerror}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--keep-onnx {folder}: cannot be written: {error.strerror}") from error


def _add_to_bundle(root: Path, name: str, record: EngineRecord, staging: Path) -> None:
    """Rename `staging` to the engine's folder and put the engine into the manifest.

    The manifest names the engine only while its files are in place, so the bundle is whole at any moment.
    """
    folder = root / engine_prefix(name)
    hashes = {engine_prefix(name) + path: digest for path, digest in hash_folder(staging).items()}
    staging.chmod(0o755)
    with locked(root):
        manifest = read_manifest(root)  # another build may have added its engine meanwhile
        others = manifest.without_engine(name)
        if name in manifest.engines:
            write_manifest(root, others)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        staging.rename(folder)
        added = {"engines": {**others.engines, name: record}, "files": {**others.files, **hashes}}
        write_manifest(root, others.model_copy(update=added))
