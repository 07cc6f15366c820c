"""Why a machine cannot build or run engines of a target.

In: a `Target` and a `Machine`. Out: one sentence that says what is in the way and what to do, or None. Not covered:
what a model itself asks of a target (`Target.refusal`).
"""

from c2c_export.bundle import EngineRecord
from c2c_export.errors import install_command
from engines.machine import CUDA_PROVIDER, Gpu, Machine
from engines.targets import Target, capability_number

LOWERING_MODULES = ("onnx", "onnx_ir", "onnxscript")
"""What every build reads and writes graphs with; the runtime does without."""


def build_obstacle(target: Target, machine: Machine, precision: str | None = None) -> str | None:
    """Why `machine` cannot build engines of `target` (in `precision`, if given), or None where it can."""
    missing = [name for name in LOWERING_MODULES if machine.modules[name].version is None]
    if missing:
        install = install_command("build") if target.runs_on_onnx_runtime else target.pip
        return f"{', '.join(missing)} cannot be imported; install them with: {install}"
    if target.runs_on_onnx_runtime:
        return None
    obstacle = _module_obstacle(target, machine)
    if obstacle is not None or not target.needs_gpu_to_build:
        return obstacle
    return machine.cuda_problem or _gpu_obstacle(target, machine.gpus[0], precision)


def run_obstacle(target: Target, machine: Machine, precision: str | None = None) -> str | None:
    """Why `machine` cannot run engines of `target` (in `precision`, if given), or None where it can."""
    if target.runs_on_onnx_runtime:
        obstacle = _onnx_runtime_obstacle(target, machine)
    else:
        obstacle = _module_obstacle(target, machine)
    if obstacle is not None or not target.needs_gpu_to_run:
        return obstacle
    if machine.cuda_problem is not None:
        return machine.cuda_problem
    return _gpu_obstacle(target, machine.gpus[0], precision)


def record_obstacle(record: EngineRecord, target: Target, machine: Machine) -> str | None:
    """Why `machine`, which runs engines of `target`, cannot run this one, going by how it was built; or None."""
    if record.build is None or target.runs_on_onnx_runtime:
        return None
    rebuild = f"build it again: c2c-export build BUNDLE --engine {target.name} --precision {record.precision}"
    built_with, installed = record.build.versions.get(target.module), machine.modules[target.module].version
    if built_with is not None and built_with != installed:
        return f"it was built with {target.module} {built_with}, {installed} is installed; install that, or {rebuild}"
    gpu, built_on = machine.gpus[0], record.build.gpu
    if built_on is not None and (built_on.name, built_on.compute_capability) != (gpu.name, gpu.compute_capability):
        return (
            f"it was built on {built_on.name} (compute capability {built_on.compute_capability}) and runs on that GPU "
            f"alone, this machine's is {gpu.name} ({gpu.compute_capability}); {rebuild} on this machine"
        )
    served = record.build.compute_capabilities or target.default_compute_capabilities
    if served and gpu.compute_capability not in served:
        option = "" if target.needs_gpu_to_build else f" --compute-capability {gpu.compute_capability}"
        return (
            f"it was built for compute capability {', '.join(served)}, {gpu.name} has {gpu.compute_capability}; "
            f"{rebuild}{option}"
        )
    return None


def _module_obstacle(target: Target, machine: Machine) -> str | None:
    module = machine.modules[target.module]
    if module.version is None:
        problem = module.problem or ""
        # "not installed", but "cannot be imported: …"
        state = f"is {problem}" if problem.startswith("not ") else problem
        return f"the module {target.module} {state}; install it with: {target.pip}"
    return None


def _onnx_runtime_obstacle(target: Target, machine: Machine) -> str | None:
    runtime = machine.onnx_runtime
    if runtime.problem is not None:
        return f"onnxruntime: {runtime.problem}"
    provider = CUDA_PROVIDER if target.needs_gpu_to_run else "CPUExecutionProvider"
    if provider not in runtime.providers:
        installed = ", ".join(f"{name} {version}" for name, version in runtime.distributions.items())
        return f"{installed} offers no {provider}; install one that does with: {target.pip}"
    return None


def _gpu_obstacle(target: Target, gpu: Gpu, precision: str | None) -> str | None:
    found = f"{gpu.name} has compute capability {gpu.compute_capability}"
    if target.compute_capabilities and gpu.compute_capability not in target.compute_capabilities:
        return f"{found}; {target.name} serves {', '.join(target.compute_capabilities)}"
    lowest = target.precision_capability.get(precision or "")
    if lowest is not None and capability_number(gpu.compute_capability) < capability_number(lowest):
        return f"{found}; kernels in {precision} begin at {lowest}"
    return None
