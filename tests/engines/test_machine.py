"""What is found out about a machine: GPUs from nvidia-smi, modules, and whether ONNX Runtime is as pip left it."""

import base64
import hashlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.machine import CUDA_PYTHON, Gpu, check_onnx_runtime, parse_nvidia_smi, probe_machine, probe_module

LISTING = """NVIDIA GeForce RTX 4090, 8.9, 24564, 580.65.06
NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65.06
"""


def test_gpus_are_read_from_nvidia_smi():
    gpus, driver = parse_nvidia_smi(LISTING)
    assert gpus == (
        Gpu("NVIDIA GeForce RTX 4090", "8.9", 24564 * 2**20),
        Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559 * 2**20),
    )
    assert driver == "580.65.06"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        "No devices were found\n",
        "NVIDIA H100, [N/A], [Unknown Error], 580.65.06\n",
        "Field, compute_cap, is, invalid\n",
    ],
)
def test_messages_of_nvidia_smi_are_no_gpus(text: str):
    assert parse_nvidia_smi(text) == ((), None)


@given(st.text())
def test_any_text_is_read_without_an_error(text: str):
    gpus, driver = parse_nvidia_smi(text)
    assert (driver is None) == (not gpus)


def test_modules_are_imported_for_their_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "good_one.py").write_text("__version__ = '1.2'\n")
    (tmp_path / "half_one.py").write_text("import absent_one\n")
    (tmp_path / "broken_one.py").write_text("raise OSError('libfoo.so.1: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert probe_module("good_one").version == "1.2"
    assert probe_module("absent_one").problem == "not installed"
    assert probe_module("absent_one.deeper").problem == "not installed"
    assert probe_module("half_one").problem == "cannot be imported: absent_one is missing"
    assert probe_module("broken_one").problem == "cannot be imported: libfoo.so.1: cannot open"
    for name in ("good_one", "half_one", "broken_one"):
        sys.modules.pop(name, None)


def test_a_module_without_a_readable_version_is_a_problem_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "folder_one").mkdir()
    (tmp_path / "lazy_one.py").write_text("def __getattr__(name):\n    raise OSError(f'no {name} today')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, reason in (("folder_one", "has no attribute '__version__'"), ("lazy_one", "no ")):
        found = probe_module(name)
        assert found.version is None
        assert found.problem is not None
        assert found.problem.startswith(f"cannot be used: what is imported from {tmp_path / name}")
        assert reason in found.problem
        assert probe_machine([name]).modules[name] == found
        sys.modules.pop(name)


def test_this_machine_can_be_probed():
    machine = probe_machine(["numpy", "no_such_module"])
    assert machine.modules["numpy"].version
    assert machine.modules["no_such_module"].problem == "not installed"
    assert CUDA_PYTHON in machine.modules
    assert "CPUExecutionProvider" in machine.onnx_runtime.providers
    assert machine.onnx_runtime.problem is None
    assert (machine.cuda_problem is None) <= bool(machine.gpus)


def install(site: Path, distribution: str, version: str, files: dict[str, str]) -> None:
    """What pip leaves of a wheel: files, and a record of their sizes. A later one overwrites an earlier one's files."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,", "onnxruntime/__pycache__/x.cpython-311.pyc,,"]
    for name, content in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    (info / "RECORD").write_text("\n".join(lines) + "\n")


CPU_FILES = {"onnxruntime/__init__.py": "cpu", "onnxruntime/capi/state.so": "cpu build"}
GPU_FILES = {"onnxruntime/__init__.py": "gpu", "onnxruntime/capi/state.so": "the gpu build"}


def test_one_onnx_runtime_as_installed_has_no_problem(tmp_path: Path):
    install(tmp_path, "onnxruntime-gpu", "1.31.1", GPU_FILES)
    found = check_onnx_runtime([str(tmp_path)])
    assert (found.distributions, found.problem) == ({"onnxruntime-gpu": "1.31.1"}, None)


def test_both_onnx_runtimes_are_a_conflict_with_the_way_to_mend_it(tmp_path: Path):
    install(tmp_path, "onnxruntime", "1.32.0", CPU_FILES)
    install(tmp_path, "onnxruntime-gpu", "1.31.1", GPU_FILES)
    found = check_onnx_runtime([str(tmp_path)])
    assert found.distributions == {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    assert found.problem is not None
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed" in found.problem
    assert "pip uninstall --yes onnxruntime onnxruntime-gpu" in found.problem
    assert "scripts/install_gpu.sh" in found.problem


@pytest.mark.parametrize("damage", ["overwritten", "removed"])
def test_files_that_another_distribution_took_are_noticed(damage: str, tmp_path: Path):
    install(tmp_path, "onnxruntime", "1.32.0", CPU_FILES)
    file = tmp_path / "onnxruntime" / "capi" / "state.so"
    if damage == "removed":
        file.unlink()
    else:
        file.write_text("the gpu build")
    problem = check_onnx_runtime([str(tmp_path)]).problem
    assert problem is not None
    assert "1 files of onnxruntime are missing or not its own, such as onnxruntime/capi/state.so" in problem
    assert "mend with" in problem


def test_no_onnx_runtime_is_said(tmp_path: Path):
    problem = check_onnx_runtime([str(tmp_path)]).problem
    assert problem is not None
    assert problem.startswith("not installed")


def test_others_with_like_names_are_no_conflict(tmp_path: Path):
    install(tmp_path, "onnxruntime", "1.32.0", CPU_FILES)
    install(tmp_path, "onnxruntime-genai", "0.9", {"onnxruntime_genai/__init__.py": ""})
    assert check_onnx_runtime([str(tmp_path)]).problem is None
