"""What this machine can build and run, and why not: the report of `c2c-export doctor`.

In: the machine. Out: a `Report`, printed as text or JSON. Nothing here needs ONNX Runtime or any other library that a
target runs on, since a missing or broken one is what it is to report. Not covered: bundles, whose engines
`c2c-export inspect` shows.
"""

import dataclasses
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from c2c_export import __version__
from engines.machine import CUDA_PYTHON, Machine, probe_machine
from engines.obstacles import LOWERING_MODULES, build_obstacle, run_obstacle
from engines.targets import TARGETS, Target


@dataclass(frozen=True)
class TargetReport:
    """What a machine can do with a target. An obstacle is a sentence, or None where there is none."""

    module: str
    installed: str | None
    """The module's version here."""
    tried: str | None
    """The version that this project was tried with."""
    build_obstacle: str | None
    run_obstacle: str | None
    takes: str
    """Its limits in one line."""
    precisions: dict[str, str | None]
    """Each of the target's precisions with what is in the way of running it."""
    known_limits: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The machine, and every target by name."""

    c2c_export: str
    python: str
    machine: Machine
    targets: dict[str, TargetReport]


def examine(machine: Machine | None = None) -> Report:
    """Judge this machine, or another one's description."""
    if machine is None:
        machine = probe_machine([*LOWERING_MODULES, *(target.module for target in TARGETS.values())])
    targets = {name: _examine_target(target, machine) for name, target in TARGETS.items()}
    return Report(__version__, platform.python_version(), machine, targets)


def to_json(report: Report) -> str:
    """The report as JSON, its fields named as those of `Report`."""
    return json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False)


def print_report(report: Report, console: Console) -> None:
    """Print `report`: the machine, a table of the targets, and lines that say more and can be copied."""
    table = Table()
    for header in ("target", "module", "installed", "tried", "build", "run"):
        table.add_column(header, no_wrap=True)
    for name, target in report.targets.items():
        table.add_row(
            name,
            target.module,
            target.installed or "no",
            target.tried or "never",
            _verdict(target.build_obstacle),
            _verdict(target.run_obstacle),
        )
    for line in _machine_lines(report):
        console.print(Text(line), soft_wrap=True)
    console.print(table)
    for line in _target_lines(report):
        console.print(Text(line), soft_wrap=True)


def _examine_target(target: Target, machine: Machine) -> TargetReport:
    return TargetReport(
        module=target.module,
        installed=machine.modules[target.module].version,
        tried=target.version_tried,
        build_obstacle=build_obstacle(target, machine),
        run_obstacle=run_obstacle(target, machine),
        takes=target.summary,
        precisions={precision: run_obstacle(target, machine, precision) for precision in target.precisions},
        known_limits=target.known_limits,
    )


def _machine_lines(report: Report) -> Iterator[str]:
    machine = report.machine
    yield f"c2c-export {report.c2c_export}, Python {report.python}"
    for number, gpu in enumerate(machine.gpus):
        gigabytes = gpu.memory_bytes / 1e9
        yield f"GPU {number}: {gpu.name}, compute capability {gpu.compute_capability}, {gigabytes:.1f} GB"
    if machine.cuda_problem is not None:
        yield f"CUDA: {machine.cuda_problem}"
    yield f"NVIDIA driver: {machine.driver or 'none found'}"
    cuda_python = machine.modules[CUDA_PYTHON]
    yield f"cuda-python: {cuda_python.version or cuda_python.problem}"
    runtime = machine.onnx_runtime
    versions = ", ".join(f"{name} {version}" for name, version in runtime.distributions.items()) or "not installed"
    yield f"ONNX Runtime: {versions}; providers: {', '.join(runtime.providers) or 'none'}"
    if runtime.problem is not None:
        yield f"ONNX Runtime, problem: {runtime.problem}"


def _target_lines(report: Report) -> Iterator[str]:
    for name, target in report.targets.items():
        if target.build_obstacle is not None:
            yield f"{name}, build: {target.build_obstacle}"
        if target.run_obstacle is not None:
            yield f"{name}, run: {target.run_obstacle}"
        else:
            refused = {precision: obstacle for precision, obstacle in target.precisions.items() if obstacle is not None}
            yield f"{name} runs {', '.join(precision for precision in target.precisions if precision not in refused)}"
            yield from (f"{name} in {precision}, run: {obstacle}" for precision, obstacle in refused.items())
        yield f"{name} takes {target.takes}"
        yield from (f"{name}, limit: {limit}" for limit in target.known_limits)
        if None not in (target.installed, target.tried) and target.installed != target.tried:
            yield f"{name}: {target.module} {target.installed} is installed, {target.tried} was tried"


def _verdict(obstacle: str | None) -> str:
    return "[green]yes[/]" if obstacle is None else "[red]no[/]"
