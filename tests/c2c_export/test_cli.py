"""The command line: complete help, exit codes, errors without a traceback, text streamed to stdout as in the API."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCli

from c2c_export import __version__
from runtime import C2CPipeline

ROOT = Path(__file__).parents[2]
ALIGNED = "qwen3_from_llama_aligned"
PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def bundle(recorded_bundle: Callable[[str], Path]) -> Path:
    return recorded_bundle(ALIGNED)


@pytest.fixture
def pipeline(recorded_pipeline: Callable[[str], C2CPipeline]) -> C2CPipeline:
    return recorded_pipeline(ALIGNED)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# Help, version, usage


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "pair",
            "--receiver --sharer --fuser --output -o --max-length --fusion-mode --receiver-chat-template "
            "--sharer-chat-template --overwrite",
        ),
        ("inspect", "--json"),
        (
            "bench",
            "--engine --precision --threads --prompt-tokens --batch --new-tokens --repeats --seed --json --plot "
            "--roofline --text-to-text --reference --reference-python --receiver --sharer --fuser --allow-unchecked "
            "--allow-failed",
        ),
        (
            "check",
            "--receiver --sharer --fuser --receiver-chat-template --sharer-chat-template --engine --precision "
            "--prompts --level --questions --new-tokens --bisect --report --json --save-results --threads",
        ),
        ("doctor", "--json"),
        (
            "build",
            "--engine --precision --max-batch --compute-capability --decode-optimum --prefill-optimum "
            "--fuse-optimum --keep-onnx --timing-cache --rebuild",
        ),
        (
            "generate",
            "--prompt -p --system --fuse --no-fuse --sharer --max-new-tokens --stop --temperature --top-k --top-p "
            "--min-p --repetition-penalty --seed --ignore-eos --engine --precision --threads --allow-unchecked "
            "--allow-failed --timings",
        ),
    ],
)
def test_help_describes_every_option_of_a_command(run_cli: RunCli, command: str, options: str) -> None:
    code, out, _ = run_cli(command, "--help")
    assert code == 0
    described = {}
    for block in re.split(r"\n  (?=-)", out.partition("Options:")[2])[1:]:
        header, _, text = " ".join(block.split()).partition(" ")
        names = {header, *re.findall(r"(?<![\w\[])--?[a-z][a-z-]*", block.partition("  ")[0])}
        described.update({name.rstrip(","): text for name in names for name in name.replace("/", " ").split()})
    assert set(described) == {*options.split(), "--help"}
    for option, text in described.items():
        assert re.search(r"[A-Z][^.]* [^.]*\w\b", text), option


def test_help_keeps_what_stands_in_brackets(run_cli: RunCli) -> None:
    pair, generate = (" ".join(run_cli(command, "--help")[1].split()) for command in ("pair", "generate"))
    for text in (
        "a hub id[@revision]",
        "a hub id[:subfolder][@revision]",
        "[default: 2048, or all positions",
        "[required]",
    ):
        assert text in pair
    for text in ("[default: physical cores]", "[default: ort-cpu]", "[default: up to the bundle's capacity]"):
        assert text in generate


def test_the_program_alone_shows_its_commands(run_cli: RunCli) -> None:
    for arguments in ((), ("--help",)):
        code, out, err = run_cli(*arguments)
        assert code in (0, 2)
        assert all(command in plain(out + err) for command in ("pair", "build", "inspect", "doctor", "generate"))


def test_the_version_is_printed(run_cli: RunCli) -> None:
    assert run_cli("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("inspect",),
        ("generate", "a.bundle"),
        ("generate", "a.bundle", "-p", "x", "--max-new-tokens", "many"),
        ("generate", "a.bundle", "-p", "x", "--no-such-option"),
        ("pair", "--receiver", "a"),
    ],
)
def test_wrong_arguments_exit_with_2(run_cli: RunCli, arguments: tuple[str, ...]) -> None:
    code, out, err = run_cli(*arguments)
    assert code == 2
    assert out == ""
    assert err


def test_without_torch_pair_says_what_to_install_while_help_and_inspect_work(bundle: Path) -> None:
    # a bare install, as far as the import system can tell
    bare = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Bare(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        extra = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript', 'gguf', 'safetensors',\n"
        "                 'huggingface_hub', 'accelerate'}\n"
        "        return None if name.split('.')[0] in extra else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]\n"
        "from c2c_export.cli import main\n"
        "main()\n"
    )

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", bare, *(str(argument) for argument in arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    failed = run("pair", "--receiver", "a", "--sharer", "b", "--fuser", "c", "-o", "d")
    assert failed.returncode == 2
    assert "torch" in failed.stderr
    assert "pip install -c constraints.txt '.[export]' (in a clone of c2c-export)" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert run("pair", "--help").returncode == 0
    assert json.loads(run("inspect", bundle, "--json").stdout)["schema_version"] == 1
    answer = run("generate", bundle, "-p", PROMPT, "--max-new-tokens", 2)
    assert answer.returncode == 0, answer.stderr


# Errors


def test_messages_are_printed_as_they_are_whatever_characters_they_hold(run_cli: RunCli, tmp_path: Path) -> None:
    for name in ("a[x]", "b[/x]", "[bold red]", "c\\[x]", ":smile: é", "trailing\\"):
        folder = tmp_path / name
        code, out, err = run_cli("inspect", folder)
        assert (code, out) == (1, "")
        assert f"error: {folder} is not a bundle" in err


def test_a_damaged_bundle_is_refused_by_every_command(run_cli: RunCli, bundle: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    with (damaged / "graphs" / "receiver.onnx.data").open("r+b") as file:
        file.write(b"\xff")
    for arguments in (("inspect", damaged), ("inspect", damaged, "--json"), ("generate", damaged, "-p", PROMPT)):
        code, out, err = run_cli(*arguments)
        assert (code, out) == (1, "")
        assert str(damaged / "graphs" / "receiver.onnx.data") in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-p", ""), "prompt"),
        (("-p", " word" * 2000), "capacity"),
        (("-p", PROMPT, "--max-new-tokens", 0), "--max-new-tokens is 0"),
        (("-p", PROMPT, "--max-new-tokens", 100_000), "max_new_tokens"),
        (("-p", PROMPT, "--sharer", 3), "sharer"),
        (("-p", PROMPT, "--temperature", -1), "--temperature: -1.0"),
        (("-p", PROMPT, "--top-p", 2), "--top-p: 2.0"),
        (("-p", PROMPT, "--engine", "tensorrt"), "ort-cpu"),
        (("-p", PROMPT, "--precision", "fp8"), "fp32"),
        (("-p", PROMPT, "--threads", -1), "--threads is -1"),
    ],
)
def test_a_request_that_cannot_be_served_exits_with_2(
    run_cli: RunCli, bundle: Path, arguments: tuple[object, ...], expected: str
) -> None:
    few = () if "--max-new-tokens" in arguments else ("--max-new-tokens", 4)
    code, out, err = run_cli("generate", bundle, *few, *arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert expected in err
    assert len(err.strip().splitlines()) <= 2


def run_program(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the console script in a process of its own."""
    command = [sys.executable, "-c", "from c2c_export.cli import main; main()", *(str(value) for value in arguments)]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, cwd=ROOT, text=True, timeout=120, check=False, **settings)


def test_what_the_system_refuses_is_an_error_of_one_line(run_cli: RunCli, tmp_path: Path) -> None:
    too_long, fuser = tmp_path / ("x" * 300), ROOT / "tests" / "golden" / "qwen3_from_qwen2" / "fuser"
    for arguments in (
        ("inspect", too_long),
        ("generate", too_long, "-p", PROMPT),
        ("build", too_long, "--engine", "tensorrt-rtx"),
        ("pair", "--receiver", too_long, "--sharer", "b", "--fuser", fuser, "-o", tmp_path / "d"),
        ("pair", "--receiver", "a", "--sharer", "b", "--fuser", too_long, "-o", tmp_path / "d"),
        ("pair", "--receiver", "a", "--sharer", "b", "--fuser", "c", "-o", too_long),
    ):
        code, out, err = run_cli(*arguments)
        assert code in (1, 2)
        assert out == ""
        errors = [line for line in err.splitlines() if not line.endswith("…")]
        assert len(errors) == 1
        assert errors[0].startswith("error: ")
        assert "File name too long" in errors[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has the device that is always full")
def test_output_into_a_full_disk_ends_with_one_line(bundle: Path) -> None:
    generate = ("generate", bundle, "-p", PROMPT, "--max-new-tokens", 4, "--allow-unchecked")
    for arguments in (("inspect", bundle), generate):
        with Path("/dev/full").open("w") as full:
            done = run_program(*arguments, stdout=full)
        assert done.returncode == 1
        assert done.stderr == "error: output: No space left on device\n"


def test_a_terminal_without_unicode_gets_every_command_all_the_same(bundle: Path) -> None:
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for arguments in (("inspect", bundle), ("doctor",), ("generate", bundle, "-p", "é", "--max-new-tokens", 4)):
        done = run_program(*arguments, env=ascii_only)
        assert done.returncode == 0, done.stderr


def test_tables_in_a_pipe_are_not_cut(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    shown = run_program("inspect", bundle, env={**os.environ, "COLUMNS": "40"}).stdout
    assert manifest["receiver"]["source"] in shown
    assert "…" not in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stopped_export_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    case = ROOT / "tests" / "golden" / "qwen3_from_qwen2"
    options = [("--receiver", case / "receiver"), ("--sharer", case / "sharer"), ("--fuser", case / "fuser")]
    command = [sys.executable, "-c", "from c2c_export.cli import main; main()", "pair", "-o", tmp_path / "bundle"]
    with subprocess.Popen(
        [str(word) for word in (*command, *(word for option in options for word in option))],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".bundle.partial-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_a_library_is_imported_ends_quietly(bundle: Path) -> None:
    program = (
        "import signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnx_ir':\n"
        "            try:\n"
        "                signal.raise_signal(signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n"
        "                raise ImportError('initialization failed')\n"
        "from c2c_export.cli import main\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, "build", str(bundle), "--engine", "tensorrt-rtx"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


# Generating


def test_generate_prints_the_text_of_the_api(run_cli: RunCli, bundle: Path, pipeline: C2CPipeline) -> None:
    for arguments, options in (
        ((), {}),
        (("--no-fuse",), {"fuse": False}),
        (("--sharer", 0), {"sharers": [0]}),
        (("--temperature", 0.8, "--seed", 3, "--top-k", 20), {"temperature": 0.8, "seed": 3, "top_k": 20}),
    ):
        code, out, err = run_cli("generate", bundle, "-p", PROMPT, "--max-new-tokens", 12, "--ignore-eos", *arguments)
        expected = pipeline.generate(PROMPT, max_new_tokens=12, ignore_eos=True, **options)
        assert (code, out, err) == (0, expected.text + "\n", "")


def test_fusing_changes_the_answer(pipeline: C2CPipeline) -> None:
    answers = [
        pipeline.generate(PROMPT, max_new_tokens=12, ignore_eos=True, fuse=fuse).token_ids for fuse in (True, False)
    ]
    assert answers[0] != answers[1]


def test_a_system_message_and_stop_strings_reach_the_request(
    run_cli: RunCli, bundle: Path, pipeline: C2CPipeline
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    whole = pipeline.generate(messages, max_new_tokens=16, ignore_eos=True).text
    stop = whole[5:7]
    expected = pipeline.generate(messages, max_new_tokens=16, ignore_eos=True, stop=[stop]).text
    code, out, _ = run_cli(
        *("generate", bundle, "-p", PROMPT, "--system", "Be brief.", "--max-new-tokens", 16),
        *("--ignore-eos", "--stop", stop),
    )
    assert (code, out) == (0, expected + "\n")
    assert stop not in out


def test_timings_go_to_stderr(run_cli: RunCli, bundle: Path) -> None:
    code, out, err = run_cli("generate", bundle, "-p", PROMPT, "--max-new-tokens", 3, "--timings")
    assert code == 0
    assert "prefill" not in out
    assert re.search(r"sharer prefill [\d.]+ s.*first token after [\d.]+ s.*\d+ further tokens? in [\d.]+ s", err)


def test_text_comes_out_while_it_is_generated(bundle: Path) -> None:
    command = [sys.executable, "-c", "from c2c_export.cli import main; main()", "generate", str(bundle), "-p", PROMPT]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "150", "--ignore-eos"], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read1(1)  # type: ignore[attr-defined]
        assert first
        assert process.poll() is None  # the rest is yet to come
        process.stdout.read()
    assert process.returncode == 0
