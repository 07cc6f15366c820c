"""What a build depends on, and what can be refused before any work.

In: `BuildOptions`, the table of targets, the bundle's manifest and the machine. Out: a `BuildPlan`; two equal plans
give equal engines, so that one that is there need not be built again. Not covered: building (`c2c_export.build`).
"""

import importlib
import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from c2c_export import __version__
from c2c_export.bundle import (
    Bundle,
    EngineRecord,
    GpuRecord,
    GraphRecord,
    Manifest,
    ProfileRecord,
    ProfileSizes,
)
from c2c_export.errors import C2CError, UsageError
from engines.machine import Machine, probe_machine
from engines.obstacles import LOWERING_MODULES, build_obstacle
from engines.targets import Target, capability_number, target_of
from engines.trt.build import decoder_profiles, fuser_profiles

_DEFAULT_MAX_BATCH = 8
_DEFAULT_DECODE_OPTIMUM = 1
_DEFAULT_OPTIMUM = 512
_LARGEST_SHARE = 0.6
"""Size of an engine or a lowered graph in that of the float32 graph, at most; docs/architecture.md has the sizes."""
_KERNEL_BYTES = 10_000_000
"""Kernels in an engine, however small its weights."""
_PROFILE_FLAGS = ("max_batch", "decode_optimum", "prefill_optimum", "fuse_optimum")


@dataclass(frozen=True)
class BuildOptions:
    """What to build. None takes the default."""

    bundle: Path
    target: str
    precision: str
    compute_capabilities: Sequence[str] = ()
    """GPUs to build for, such as "8.9"; empty for the target's default."""
    max_batch: int | None = None
    """Requests that one decode step serves at most; 8 by default."""
    decode_optimum: int | None = None
    """Requests of a decode step that kernels are chosen for; 1 by default."""
    prefill_optimum: int | None = None
    """Prompt tokens that kernels are chosen for; by default the smaller of 512 and the capacity."""
    fuse_optimum: int | None = None
    """Fused tokens, likewise."""
    keep_onnx: Path | None = None
    """A folder to keep the lowered graphs in."""
    timing_cache: Path | None = None
    """TensorRT's measurements of kernels, read and updated, only for a target that measures them. None takes a file per
    version and GPU in the cache folder."""
    rebuild: bool = False
    """Build even if nothing changed."""

    @property
    def engine_name(self) -> str:
        """The engine's name in the manifest, and its folder's."""
        capabilities = sorted({capability_number(capability) for capability in self.compute_capabilities})
        arch = "+".join(f"sm{number}" for number in capabilities)
        return f"{self.target}-{self.precision}{f'-{arch}' if arch else ''}"


@dataclass(frozen=True)
class BuildPlan:
    """What a build depends on, and its engine's name."""

    name: str
    target: Target
    precision: str
    graphs: dict[str, GraphRecord]
    capacity: int
    compute_capabilities: tuple[str, ...]
    gpu: GpuRecord | None
    profile_sizes: ProfileSizes | None
    versions: dict[str, str]
    sources: dict[str, str]

    @property
    def shares_weights(self) -> bool:
        """Whether the lowered graphs read the weights of the portable graphs, rather than own ones."""
        return self.target.runs_on_onnx_runtime and self.precision == "fp32"

    def equals(self, record: EngineRecord) -> bool:
        """Whether `record` is of an engine that this plan would build again."""
        done = record.build
        if done is None or done.graphs.keys() != self.graphs.keys():
            return False
        settings = ("compute_capabilities", "gpu", "profile_sizes", "versions", "sources")
        return all(getattr(done, name) == getattr(self, name) for name in settings)

    def profiles(self, name: str) -> tuple[ProfileRecord, ...]:
        """The profiles of one of the graphs; none for ONNX Runtime."""
        if self.profile_sizes is None:
            return ()
        make = fuser_profiles if name.startswith("fuser") else decoder_profiles
        return make(self.graphs[name].inputs, self.capacity, self.profile_sizes)

    def check_disk(self, root: Path) -> None:
        """Raise `C2CError` where the disk cannot hold the engines and, meanwhile, the largest lowered graph."""
        sizes = [graph.num_bytes for graph in self.graphs.values()]
        needed = 0 if self.shares_weights else int((sum(sizes) + max(sizes, default=0)) * _LARGEST_SHARE)
        if not self.target.runs_on_onnx_runtime:
            needed += len(sizes) * _KERNEL_BYTES
        free = shutil.disk_usage(root).free
        if needed > free:
            raise C2CError(
                f"{root}: the disk is full: building {self.name} takes about {needed / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free; nothing was written"
            )


def check_options(options: BuildOptions) -> Target:
    """The target, after everything was refused that neither bundle nor machine has to be looked at for.

    Raises `UsageError` naming the option.
    """
    target = target_of(options.target)
    if target.needs_gpu_to_run and target.runs_on_onnx_runtime and options.precision == "fp32":
        raise UsageError(f"{target.name} in fp32 runs the portable graphs as they are; there is nothing to build")
    for name in _PROFILE_FLAGS:
        size = getattr(options, name)
        if size is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if target.runs_on_onnx_runtime:
            raise UsageError(f"{flag} {size}: {target.name} has no profiles; its engines take any size")
        if size < 1:
            raise UsageError(f"{flag} {size}: expected at least 1")
    refusal = target.refusal(options.precision, compute_capabilities=options.compute_capabilities)
    if refusal is not None:
        raise UsageError(refusal)
    if options.timing_cache is not None and not target.needs_gpu_to_build:
        raise UsageError(
            f"--timing-cache: {target.name} times no kernels when it builds; what it compiles on the GPU is cached "
            "when the engine runs"
        )
    if options.keep_onnx is not None:
        if options.keep_onnx.exists() and not options.keep_onnx.is_dir():
            raise UsageError(f"--keep-onnx {options.keep_onnx}: exists and is not a folder")
        if options.keep_onnx.resolve().is_relative_to(options.bundle.resolve()):
            raise UsageError(f"--keep-onnx {options.keep_onnx}: lies in the bundle; choose a folder outside of it")
    return target


def plan_build(options: BuildOptions, target: Target, bundle: Bundle) -> BuildPlan:
    """The plan. Raises `UsageError` for what the target cannot do with this pair, `C2CError` for what lacks here."""
    manifest = bundle.manifest
    _check_pair(options, target, manifest)
    profile_sizes = None if target.runs_on_onnx_runtime else _profile_sizes(options, manifest.max_length)
    machine = _check_machine(target, options.precision)
    graphs = manifest.graphs
    paths = {path for graph in graphs.values() for path in (graph.path, f"{graph.path}.data")}
    versions = {"c2c-export": __version__, "onnx_ir": importlib.metadata.version("onnx_ir")}
    if target.name == "ort-cpu":
        versions["onnxscript"] = importlib.metadata.version("onnxscript")
    if not target.runs_on_onnx_runtime:
        versions[target.module] = str(importlib.import_module(target.module).__version__)
    gpu = machine.gpus[0] if target.needs_gpu_to_build else None
    return BuildPlan(
        name=options.engine_name,
        target=target,
        precision=options.precision,
        graphs=graphs,
        capacity=manifest.max_length,
        compute_capabilities=tuple(sorted(set(options.compute_capabilities), key=capability_number)),
        gpu=None if gpu is None else GpuRecord(name=gpu.name, compute_capability=gpu.compute_capability),
        profile_sizes=profile_sizes,
        versions=versions,
        sources={path: manifest.files[path] for path in sorted(paths & manifest.files.keys())},
    )


def _profile_sizes(options: BuildOptions, capacity: int) -> ProfileSizes:
    max_batch = options.max_batch or _DEFAULT_MAX_BATCH
    default = min(_DEFAULT_OPTIMUM, capacity)
    for name, largest, what in (
        ("decode_optimum", max_batch, "--max-batch"),
        ("prefill_optimum", capacity, "the bundle's capacity"),
        ("fuse_optimum", capacity, "the bundle's capacity"),
    ):
        size = getattr(options, name)
        if size is not None and size > largest:
            raise UsageError(f"--{name.replace('_', '-')} {size}: expected 1 to {largest}, {what}")
    return ProfileSizes(
        max_batch=max_batch,
        decode_optimum=options.decode_optimum or _DEFAULT_DECODE_OPTIMUM,
        prefill_optimum=options.prefill_optimum or default,
        fuse_optimum=options.fuse_optimum or default,
    )


def _check_pair(options: BuildOptions, target: Target, manifest: Manifest) -> None:
    """Refuse what the table of targets says that this target cannot do."""
    models = {"receiver": manifest.receiver}
    models |= {f"sharer {number}": sharer.model for number, sharer in enumerate(manifest.sharers)}
    for name, model in models.items():
        refusal = target.refusal(options.precision, head_sizes=[model.head_dim], capacity=manifest.max_length)
        if refusal is not None:
            raise UsageError(f"{options.bundle}: {name} ({model.architecture}): {refusal}")
        elements = model.num_key_value_heads * model.head_dim * manifest.max_length
        max_batch = options.max_batch or _DEFAULT_MAX_BATCH
        if target.max_tensor_elements is not None and max_batch * elements > target.max_tensor_elements:
            raise UsageError(
                f"--max-batch {max_batch}: {target.name} holds caches of {target.max_tensor_elements} elements, "
                f"which is {target.max_tensor_elements // elements} requests of {name}'s {elements} elements each; "
                "choose a smaller one"
            )


def _check_machine(target: Target, precision: str) -> Machine:
    """Refuse where the target's module or GPU is missing."""
    machine = probe_machine([target.module, *LOWERING_MODULES])
    obstacle = build_obstacle(target, machine, precision)
    if obstacle is not None:
        hint = "\nIt builds on the machine whose GPU it will run on; --engine tensorrt-rtx builds on any machine"
        raise C2CError(f"{target.name} cannot be built here: {obstacle}{hint if target.needs_gpu_to_build else ''}")
    return machine
