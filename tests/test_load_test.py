"""`scripts/load_test.py` passes a server that answers right, and fails one that does not, that grows, or ends badly."""

import importlib.util
import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

SCRIPT = Path(__file__).parents[1] / "scripts" / "load_test.py"
PAIR = "qwen3_from_llama_aligned"
FEW = ("--requests", "24", "--at-once", "6", "--slots", "3", "--rounds", "3")

pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture(scope="module")
def load_test() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load_test"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_server_that_answers_right_passes(
    load_test: ModuleType, recorded_bundle: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    load_test.main([str(recorded_bundle(PAIR)), *FEW, "--json", str(tmp_path / "found.json")])
    told = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    rounds = found["rounds"]
    # Not the exit status: of so small a process, 3 % of its memory are noise.
    assert [one["different"] + one["failed"] for one in rounds] == [[]] * 3, told.out
    assert [one["finished"] + one["left"] for one in rounds] == [24] * 3
    assert all(one["finished"] >= 22 and one["generated_tokens"] > 0 for one in rounds)
    assert "The server ended with status 0." in told.err
    assert found["before"]["resident_mb"] > 10
    assert rounds[-1]["held"]["open_files"] <= found["before"]["open_files"]


def test_another_answer_than_expected_fails_and_is_named(
    load_test: ModuleType,
    recorded_bundle: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    alone = load_test.answer_alone

    def wrong(pipe: Any, cases: list[Any]) -> dict[Any, str]:
        return alone(pipe, cases) | {cases[0]: "something else"}

    monkeypatch.setattr(load_test, "answer_alone", wrong)
    assert load_test.main([str(recorded_bundle(PAIR)), "--requests", "4", "--slots", "2"]) == 1
    told = capsys.readouterr().out
    assert "round 1: request 0: " in told
    assert "is not 'something else', as alone" in told


def test_what_grows_is_a_problem(load_test: ModuleType):
    before = load_test.Held(resident_mb=80, threads=9, open_files=12)

    def problems(*resident: float, threads: int = 9, open_files: int = 12) -> list[str]:
        held = [load_test.Held(megabytes, 9, 12) for megabytes in resident]
        held[-1] = load_test.Held(resident[-1], threads, open_files)
        found: list[str] = load_test.problems_of(before, [load_test.Round(held=one) for one in held])
        return found

    assert not problems(100, 200, 205.9)
    assert not problems(100, 200), "caches are being filled"
    assert problems(100, 200, 200, 206.1) == ["resident memory grew from 200 MB (round 2) to 206 MB"]
    pool = load_test.THREAD_POOL
    for resident in ([100], [100, 100]):
        assert not problems(*resident, threads=9 + pool), "threads are started as they are needed"
        assert problems(*resident, threads=10 + pool) == [f"threads grew from 9 to {10 + pool}"]
        assert problems(*resident, open_files=13) == ["open files grew from 12 to 13"]


SERVES = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: {at_the_end})
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def server_of(load_test: ModuleType) -> Callable[[str], Any]:
    """A server of the script's, whose process runs some code in place of ours; the port is its argument."""

    def make(code: str) -> Any:
        server = load_test.Server(Path("no.bundle"), "fp32", 1, Console(file=io.StringIO()))
        server._command = [sys.executable, "-c", code, server.url.rpartition(":")[2]]
        return server

    return make


def test_the_servers_end_is_judged(
    load_test: ModuleType, server_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
):
    for at_the_end, status in (("sys.exit(0)", 0), ("sys.exit(3)", 3)):
        with server_of(SERVES.format(at_the_end=at_the_end)) as server:
            pass
        assert (server.ended_with, server.how_it_ended) == (status, f"ended with status {status}")
    monkeypatch.setattr(load_test, "END_SECONDS", 0.2)
    with server_of(SERVES.format(at_the_end="None")) as server:
        pass
    assert server.ended_with is None
    assert server.how_it_ended == "did not end within 0.2 s, and was killed"
    assert server.process.returncode == -signal.SIGKILL


def test_a_server_that_does_not_begin_is_given_up_and_killed(
    load_test: ModuleType, server_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(SystemExit, match="the server ended with status 5"), server_of("raise SystemExit(5)"):
        pass
    monkeypatch.setattr(load_test, "START_SECONDS", 0.2)
    server = server_of("import time; time.sleep(600)")
    with pytest.raises(SystemExit, match=r"the server was not ready within 0\.2 s"), server:
        pass
    assert server.process.returncode == -signal.SIGKILL

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load_test.time, "sleep", interrupt)
    server = server_of("import time; time.sleep(600)")
    with pytest.raises(KeyboardInterrupt), server:
        pass
    assert server.process.returncode == -signal.SIGKILL
