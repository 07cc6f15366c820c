"""`optimum-cli export c2c`: the options, errors and bundles of `c2c-export pair`."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import RunCli
from optimum.commands import optimum_cli
from setuptools.config.setupcfg import read_configuration
from typer.main import get_command

from c2c_export import cli
from c2c_export.bundle import Bundle
from c2c_export.pair import PairOptions

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TWO_SHARERS = "two_sharers_sequential"


@pytest.fixture
def run_optimum(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """Run `optimum-cli export c2c` in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        command = ["optimum-cli", "export", "c2c", *(str(argument) for argument in arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        try:
            optimum_cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_plain_install_brings_no_folder_that_is_taken_for_optimum():
    packages = read_configuration(ROOT / "setup.cfg")["options"]["packages"]
    assert {package.split(".")[0] for package in packages} == {"c2c_export", "engines", "runtime"}


def test_optimum_lists_the_command():
    program = Path(sys.executable).parent / "optimum-cli"
    done = subprocess.run([program, "export", "--help"], capture_output=True, text=True, check=True)
    assert "c2c" in done.stdout
    assert "Cache-to-Cache" in done.stdout


def test_help_has_every_option_of_pair_and_its_text(run_optimum: RunCli):
    code, out, _ = run_optimum("--help")
    shown = " ".join(out.split())
    assert code == 0
    options = get_command(cli.app).commands["pair"].params
    assert {"receiver", "sharer", "fuser", "output", "overwrite"} <= {option.name for option in options}
    for option in options:
        if option.name != "help":
            assert all(name in shown for name in option.opts)
            assert " ".join((option.help or "").split()) in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["--receiver", "nowhere", "-o", "out"],
        ["--receiver", GOLDEN / TWO_SHARERS / "receiver", "--sharer", "x", "--output", "out"],
        ["--receiver", "nowhere", "-o", "out", "--max-length", "many"],
        ["--receiver", "nowhere", "-o", "out", "--fusion-mode", "both"],
    ],
    ids=["no such model", "a sharer without fuser", "a text for a number", "an unknown mode"],
)
def test_errors_are_those_of_pair(
    arguments: list[object],
    run_optimum: RunCli,
    run_cli: RunCli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_optimum(*arguments)
    expected_code, _, expected = run_cli("pair", *arguments)
    assert code == expected_code != 0
    # What stands before it may be usage, which names the program.
    assert error.lower().split("error:")[1] == expected.lower().split("error:")[1]
    assert "c2c-export pair" in error or "Usage" not in error


def test_a_missing_option_is_named(run_optimum: RunCli):
    code, _, error = run_optimum("--receiver", "x")
    assert code == 2
    assert "--output" in error


def test_every_option_reaches_the_exporter_as_from_pair(
    run_optimum: RunCli, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
):
    asked_for: list[PairOptions] = []

    def remember(options: PairOptions, _: object) -> Path:
        asked_for.append(options)
        return options.output

    monkeypatch.setattr("c2c_export.pair.export_pair", remember)
    arguments = ["--receiver", "r", "-o", "out", "--max-length", "256", "--fusion-mode", "sequential", "--overwrite"]
    arguments += ["--receiver-chat-template", "r.jinja"]
    for number in ("1", "2"):
        arguments += ["--sharer", f"s{number}", "--fuser", f"f{number}", "--sharer-chat-template", f"s{number}.jinja"]
    assert run_optimum(*arguments)[0] == run_cli("pair", *arguments)[0] == 0
    through_optimum, directly = asked_for
    assert through_optimum == directly
    assert list(directly.sharers) == ["s1", "s2"]
    assert directly.overwrite


def test_a_model_is_exported(run_optimum: RunCli, tmp_path: Path):
    receiver = GOLDEN / TWO_SHARERS / "receiver"
    code, _, error = run_optimum("--receiver", receiver, "--max-length", 64, "-o", tmp_path / "alone.bundle")
    assert code == 0, error
    manifest = Bundle.open(tmp_path / "alone.bundle").manifest
    assert (manifest.receiver.source, manifest.max_length) == (str(receiver), 64)
