"""`c2c-export doctor`: what a machine can build and run, also where libraries are missing or broken."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from c2c_export.doctor import Report, examine, print_report, to_json
from engines.machine import CUDA_PROVIDER, CUDA_PYTHON, Gpu, Machine, Module, OnnxRuntime
from engines.targets import TARGETS

ROOT = Path(__file__).parents[2]
ADA, TURING = Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 * 10**9), Gpu("Tesla T4", "7.5", 16 * 10**9)


def machine(*gpus: Gpu, rtx: str | None = "1.7.1.116", onnx_runtime: OnnxRuntime | None = None) -> Machine:
    modules = {
        "tensorrt": Module(None, "not installed"),
        "tensorrt_rtx": Module(rtx, None if rtx else "cannot be imported: libcudart.so.13: cannot open"),
        "onnxruntime": Module("1.32.0"),
        CUDA_PYTHON: Module("13.4.4"),
        "onnx": Module("1.23.2"),
        "onnx_ir": Module("1.1.0"),
        "onnxscript": Module("0.7.2"),
    }
    runtime = onnx_runtime or OnnxRuntime({"onnxruntime": "1.32.0"}, None, ("CPUExecutionProvider",))
    return Machine(gpus, None if gpus else "no GPU: no NVIDIA driver", "580.65.06" if gpus else None, modules, runtime)


def text_of(report: Report, width: int = 80) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    return out.getvalue()


def row_of(text: str, target: str) -> list[str]:
    """The cells of a target's row in the table."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"│ {target} ")]
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_a_machine_without_a_gpu_builds_for_rtx_and_runs_on_the_cpu():
    text = text_of(examine(machine()))
    assert row_of(text, "ort-cpu") == ["ort-cpu", "onnxruntime", "1.32.0", "1.32.0", "yes", "yes"]
    assert "ort-cpu runs fp32, int8, int4\n" in text
    assert row_of(text, "tensorrt-rtx")[-2:] == ["yes", "no"]
    assert row_of(text, "tensorrt")[-2:] == ["no", "no"]
    assert "CUDA: no GPU: no NVIDIA driver\n" in text
    assert "tensorrt-rtx, run: no GPU: no NVIDIA driver\n" in text
    assert "tensorrt, build: the module tensorrt is not installed; install it with: pip install" in text


def test_gpus_are_listed_with_their_compute_capability():
    text = text_of(examine(machine(ADA, TURING)))
    assert "GPU 0: NVIDIA GeForce RTX 4090, compute capability 8.9, 24.0 GB\n" in text
    assert "GPU 1: Tesla T4, compute capability 7.5, 16.0 GB\n" in text
    assert "NVIDIA driver: 580.65.06\n" in text
    assert row_of(text, "tensorrt-rtx")[-2:] == ["yes", "yes"]
    assert "tensorrt-rtx runs fp16, bf16, int8, int4\n" in text


def test_precisions_that_a_gpu_has_no_kernels_for_are_named():
    text = text_of(examine(machine(TURING)))
    assert "tensorrt-rtx runs fp16\n" in text
    assert "tensorrt-rtx in bf16, run: Tesla T4 has compute capability 7.5; kernels in bf16 begin at 8.0\n" in text


def test_a_version_that_was_not_tried_and_a_broken_module_are_said():
    assert "tensorrt-rtx: tensorrt_rtx 1.8.0.1 is installed, 1.7.1.116 was tried\n" in text_of(
        examine(machine(rtx="1.8.0.1"))
    )
    broken = text_of(examine(machine(ADA, rtx=None)))
    assert "the module tensorrt_rtx cannot be imported: libcudart.so.13: cannot open; install it with: pip" in broken
    assert row_of(broken, "tensorrt-rtx")[-2:] == ["no", "no"]


def test_a_conflict_of_onnx_runtimes_is_said_with_what_mends_it():
    problem = "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed; mend with: pip uninstall"
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    text = text_of(examine(machine(ADA, onnx_runtime=OnnxRuntime(both, problem, (CUDA_PROVIDER,)))))
    assert f"ONNX Runtime, problem: {problem}\n" in text
    assert row_of(text, "ort-cpu")[-1] == "no"
    assert f"ort-cuda, run: onnxruntime: {problem}\n" in text


def test_commands_are_never_broken_over_lines():
    for width in (60, 80, 200):
        text = text_of(examine(machine()), width)
        assert "bash scripts/install_gpu.sh\n" in text
        assert f"install it with: {TARGETS['tensorrt'].pip}\n" in text


def test_json_holds_all_of_the_report():
    report = examine(machine(ADA))
    read = json.loads(to_json(report))
    assert set(read["targets"]) == set(TARGETS)
    assert read["machine"]["gpus"] == [
        {"name": ADA.name, "compute_capability": "8.9", "memory_bytes": ADA.memory_bytes}
    ]
    for name, target in read["targets"].items():
        assert set(target["precisions"]) == set(TARGETS[name].precisions)
        assert target["known_limits"]
        assert target["run_obstacle"] == report.targets[name].run_obstacle


def run_doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "import sys\nfrom c2c_export.cli import main\nmain()\n"
    if path is not None:
        code = f"import sys\nsys.path.insert(0, {str(path)!r})\n{code}"
    command = [sys.executable, "-c", code, "doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_this_machine_is_examined_and_the_exit_code_is_0():
    done = run_doctor()
    assert (done.returncode, done.stderr) == (0, "")
    for name in TARGETS:
        row_of(done.stdout, name)
    read = json.loads(run_doctor("--json").stdout)
    assert read["targets"]["ort-cpu"]["run_obstacle"] is None
    assert read["targets"]["ort-cpu"]["installed"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise ImportError('undefined symbol: OrtGetApi')\n", "undefined symbol: OrtGetApi"),
        ("__version__ = '1.32.0'\n", "get_available_providers"),
    ],
)
def test_it_works_where_onnx_runtime_is_broken(content: str, said: str, tmp_path: Path):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(content)
    done = run_doctor(path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert row_of(done.stdout, "ort-cpu")[-1] == "no"
    assert said in done.stdout


def test_it_works_where_neither_cuda_nor_tensorrt_nor_the_exporters_libraries_are_installed(tmp_path: Path):
    for name in ("cuda", "tensorrt", "tensorrt_rtx", "onnx", "onnx_ir", "onnxscript"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
    done = run_doctor(path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert row_of(done.stdout, "tensorrt-rtx")[2:] == ["no", "1.7.1.116", "no", "no"]
    assert (
        "onnx, onnx_ir, onnxscript cannot be imported; "
        "install them with: pip install -c constraints.txt '.[tensorrt-rtx]'" in done.stdout
    )
    assert "cuda-python: not installed" in done.stdout
