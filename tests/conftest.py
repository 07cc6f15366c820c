"""Fixtures for tests over whole bundles: each bundle exported once per run, and pipelines over them.

Exporting takes from half a minute (recorded pairs) to some minutes (the demo pair), so a bundle is exported when the
first test asks for it, once for all workers of pytest-xdist. Where the environment variable C2C_EXPORT_TEST_BUNDLES
names a folder, bundles are kept there and reused by later runs; empty it after a change to the exporter.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import RunCli
from filelock import FileLock
from hypothesis import settings

from c2c_export import cli
from c2c_export.bundle import FusionMode
from runtime import C2CPipeline

# The same examples in every run: a failure is then the change's, not the day's.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
DEMO_MODELS = ROOT / ".cache" / "demo"
DEMO_MAX_LENGTH = 512
RECORDED_MAX_LENGTH = 256


def pytest_configure(config: pytest.Config) -> None:
    # Without pytest-xdist the mark means nothing, but must be known.
    config.addinivalue_line("markers", "xdist_group(name): run these tests on one worker (pytest-xdist)")


def pytest_collection_finish(session: pytest.Session) -> None:
    # Silently without effect, groups cost minutes: every worker waits for the others' exports.
    if session.config.getoption("loadgroup", default=False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") is not None and "@" not in item.nodeid:
                raise pytest.UsageError("this pytest-xdist does not group tests with this pytest; see setup.cfg")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def recorded_bundle(run_folder: Path) -> Callable[[str], Path]:
    """The bundle of tests/golden/<name>, with a capacity of RECORDED_MAX_LENGTH rows."""

    def find_or_export(name: str) -> Path:
        def export(output: Path) -> None:
            fusers = sorted((GOLDEN / name).glob("fuser*"))
            sharers = sorted((GOLDEN / name).glob("sharer*"))
            # The mode is not part of the recorded checkpoints.
            mode = json.loads((GOLDEN / name / "case.json").read_text())["fusion_mode"]
            _export(GOLDEN / name / "receiver", sharers, fusers, output, RECORDED_MAX_LENGTH, mode)

        return _once(run_folder, name, export)

    return find_or_export


@pytest.fixture(scope="session")
def recorded_pipeline(recorded_bundle: Callable[[str], Path]) -> Callable[[str], C2CPipeline]:
    """A pipeline over a recorded pair's bundle, loaded once; a test gives every slot back that it takes."""
    loaded: dict[str, C2CPipeline] = {}

    def find_or_load(name: str) -> C2CPipeline:
        if name not in loaded:
            loaded[name] = C2CPipeline.from_bundle(recorded_bundle(name), num_threads=1, allow_unchecked=True)
        return loaded[name]

    return find_or_load


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """Run the console script in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["c2c-export", *(str(argument) for argument in arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture(scope="session")
def demo_models() -> Path:
    """The folder with the demo pair's models, smollm2.gguf and gemma-3-270m.gguf."""
    for name in ("smollm2.gguf", "gemma-3-270m.gguf"):
        if not (DEMO_MODELS / name).is_file():
            pytest.fail(f"{DEMO_MODELS / name} is missing; run `bash scripts/test.sh`, which fetches it", pytrace=False)
    return DEMO_MODELS


@pytest.fixture(scope="session")
def demo_bundle(run_folder: Path, demo_models: Path) -> Path:
    """The bundle of the real demo pair. All tests that use it belong to the xdist_group "demo"."""

    def export(output: Path) -> None:
        receiver, sharer = demo_models / "smollm2.gguf", demo_models / "gemma-3-270m.gguf"
        _export(receiver, [sharer], [ROOT / "scripts" / "demo_fuser"], output, DEMO_MAX_LENGTH, "parallel")

    return _once(run_folder, "demo.bundle", export)


def _export(
    receiver: Path, sharers: list[Path], fusers: list[Path], output: Path, max_length: int, mode: FusionMode
) -> None:
    from c2c_export.pair import PairOptions, export_pair  # loads torch, which most tests can do without

    options = PairOptions(
        receiver=str(receiver),
        sharers=[str(path) for path in sharers],
        fusers=[str(path) for path in fusers],
        output=output,
        max_length=max_length,
        fusion_mode=mode,
    )
    export_pair(options, lambda _: contextlib.nullcontext())


def _once(run_folder: Path, name: str, export: Callable[[Path], None]) -> Path:
    """`export` into the folder for bundles unless `name` is there; a failure is not tried again in this run."""
    folder = Path(os.environ.get("C2C_EXPORT_TEST_BUNDLES") or run_folder / "bundles")
    failure = run_folder / f"{name}.failed"
    with FileLock(run_folder / f"{name}.lock"):
        if (folder / name / "manifest.json").is_file():
            return folder / name
        if failure.is_file():
            pytest.fail(f"the export of {name} failed before: {failure.read_text()}", pytrace=False)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            export(folder / name)
        except BaseException as error:
            failure.write_text(repr(error))
            raise
    return folder / name
