"""The runtime needs neither torch nor any exporter's library, and imports point only downwards."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "c2c_export" / "bench"
CHECK = ROOT / "c2c_export" / "check"
HARNESS = ROOT / "c2c_export" / "lm_eval"
HEAVY = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "huggingface_hub", "gguf", "safetensors")
SERVER = ROOT / "runtime" / "server"
OF_A_SERVER = ("fastapi", "starlette", "uvicorn", "prometheus_client")
RUNTIME_MAY_IMPORT = {"bundle", "check_record", "errors", "tokenizer", "chat_template", "alignment"}
ENGINES_MAY_IMPORT = {"bundle", "cache", "errors", "atomic_file"}
ABOVE_THE_RUNTIME = (["c2c_export", "bench"], ["c2c_export", "check"], ["c2c_export", "lm_eval"])
BOTTOM_LAYER = RUNTIME_MAY_IMPORT | ENGINES_MAY_IMPORT | {"record"}

GENERATE = """
import sys
import runtime

def heavy():
    return sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[2].split()))

assert not heavy(), f"import runtime brings in {heavy()}"
pipe = runtime.C2CPipeline.from_bundle(sys.argv[1])
with pipe.prefill("Hi there!") as session:
    session.generate(max_new_tokens=4, temperature=1.0, top_k=5, stop="x", seed=0, ignore_eos=True)
    session.append("Why?")
    session.generate(max_new_tokens=4, ignore_eos=True)
assert not heavy(), f"generating brings in {heavy()}"
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xdist_group(name))
        for name in ("qwen3_from_qwen2", "qwen3_from_llama_aligned")
    ],
)
def test_runtime_generates_without_the_exporters_libraries(name: str, recorded_bundle: Callable[[str], Path]):
    command = [sys.executable, "-c", GENERATE, str(recorded_bundle(name)), " ".join(HEAVY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def files_of(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no files in {package}"
    return found


def imports_of(path: Path, inside_functions: bool = True) -> Iterator[str]:
    """Every module that a file imports, dotted: "a.b" for `import a.b`, and "a.b" also for `from a import b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    if not inside_functions:
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        nodes = [node for node in nodes if id(node) not in inside]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            # `from c2c_export import bundle` imports a submodule, `from c2c_export.bundle import Bundle` a name in it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path, package: str) -> set[str]:
    """The modules directly below `package` that a file imports."""
    dotted = [name.split(".") for name in imports_of(path)]
    return {(parts[1] if len(parts) > 1 else "") for parts in dotted if parts[0] == package}


@pytest.mark.parametrize("path", files_of("runtime"), ids=lambda path: path.name)
def test_runtime_imports_only_engines_and_what_both_sides_share(path: Path):
    assert own_imports(path, "c2c_export") <= RUNTIME_MAY_IMPORT | {"__version__"}
    assert not {name.split(".")[0] for name in imports_of(path)} & set(HEAVY)


@pytest.mark.parametrize(
    "path", [path for path in files_of("runtime") if SERVER not in path.parents], ids=lambda path: path.name
)
def test_only_the_server_needs_the_libraries_of_one(path: Path):
    assert not {name.split(".")[0] for name in imports_of(path)} & set(OF_A_SERVER)
    assert "server" not in own_imports(path, "runtime")


@pytest.mark.parametrize("path", files_of("engines"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_engines_import_only_the_bundle_and_the_errors(path: Path):
    assert own_imports(path, "c2c_export") <= ENGINES_MAY_IMPORT
    assert not own_imports(path, "runtime")


@pytest.mark.parametrize("name", sorted(BOTTOM_LAYER))
def test_what_both_sides_share_imports_nothing_else_of_the_exporter(name: str):
    path = ROOT / "c2c_export" / f"{name}.py"
    assert own_imports(path, "c2c_export") <= BOTTOM_LAYER
    assert not {imported.split(".")[0] for imported in imports_of(path)} & set(HEAVY)


@pytest.mark.parametrize("path", files_of("c2c_export"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_the_command_line_its_benchmark_its_check_and_the_harness_import_the_runtime(path: Path):
    if path == ROOT / "c2c_export" / "cli.py":
        # Only when a command runs.
        at_once = [name.split(".") for name in imports_of(path, inside_functions=False)]
        above = [parts for parts in at_once if parts[0] == "runtime" or parts[:2] in ABOVE_THE_RUNTIME]
        assert not above
    elif not {BENCH, CHECK, HARNESS} & set(path.parents):
        assert not own_imports(path, "runtime")
        assert not own_imports(path, "c2c_export") & {"bench", "check", "lm_eval"}


@pytest.mark.parametrize("path", files_of("c2c_export/bench"), ids=lambda path: path.name)
def test_the_benchmark_needs_heavy_libraries_only_for_what_asks_for_them(path: Path):
    allowed = {"work.py": {"onnx_ir"}, "machine_speed.py": {"onnx_ir"}}
    at_once = {name.split(".")[0] for name in imports_of(path, inside_functions=False)}
    assert at_once & {*HEAVY, "matplotlib"} <= allowed.get(path.name, set())


def test_the_process_of_the_research_code_imports_nothing_of_ours():
    path = BENCH / "reference_process.py"
    assert not {name.split(".")[0] for name in imports_of(path)} & {"c2c_export", "engines", "runtime"}


def test_the_command_line_does_use_the_runtime():
    assert own_imports(ROOT / "c2c_export" / "cli.py", "runtime")
