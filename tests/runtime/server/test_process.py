"""`c2c-export serve` as a process: how it starts, what it logs, and what its clients see when it is told to end."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from command_line import RunCli
from served import ROOT, Served, refused, served_here, served_process, wait_until

from runtime import C2CError, C2CPipeline
from runtime.async_engine import AsyncC2CEngine
from runtime.server import serve
from runtime.server.app import begin_closing, create_app
from runtime.server.settings import ServerSettings

PAIR = "qwen3_from_llama_aligned"
CHATS = "/v1/chat/completions"
SECRET = "Zanzibar-4711"

pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture
def bundle(recorded_bundle: Callable[[str], Path]) -> Path:
    return recorded_bundle(PAIR)


def long(number: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Question {number}"}]
    return {"model": PAIR, "messages": messages, "temperature": 0, "ignore_eos": True, **fields}


def end(served: Served, number: int = signal.SIGTERM) -> int:
    assert served.process is not None
    served.process.send_signal(number)
    return served.process.wait(30)


# --- logs ---


def test_every_request_is_one_line_of_json_without_what_was_said(bundle: Path):
    body = long(0, max_tokens=5)
    body["messages"][0]["content"] = SECRET
    with served_process(bundle, "--allow-unchecked") as served:
        with served.http(headers={"X-Request-Id": "id-1"}) as client:
            answer = client.post(CHATS, json=body).json()
            streamed = client.post(CHATS, json=body | {"stream": True, "n": 2}).text
            refused(client.post(CHATS, json=body | {"model": SECRET}), 404)
            refused(client.post(CHATS, json=body | {"stop": [SECRET, ""]}), 400)
            refused(client.post(CHATS, content=f'{{"x": "{SECRET}'), 400)
            unfused = {"role": "user", "content": f" {SECRET} "}
            client.post(CHATS, json=body | {"messages": [unfused, body["messages"][0]]})
            client.get("/health")
        assert "[DONE]" in streamed
        assert end(served) == 0
    told = [line for line in served.log if line["event"] == "request"]
    assert len(told) == 6  # /health is for the debug level
    first, second, unknown, wrong, no_json, _ = told
    assert (first["request_id"], first["model"], first["status"]) == ("id-1", PAIR, 200)
    assert (first["method"], first["path"], first["stream"]) == ("POST", CHATS, False)
    assert first["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert (first["completion_tokens"], first["finish_reasons"]) == (5, ["length"])
    assert first["timings"] == pytest.approx(answer["c2c"]["timings"], abs=1e-6)
    spent = first["timings"]
    assert first["seconds"] >= spent["queued"] + spent["ttft"] + spent["decode"]
    assert (second["stream"], second["choices"], second["completion_tokens"]) == (True, 2, 10)
    assert (unknown["status"], unknown["error"], unknown["param"]) == (404, "model_not_found", "model")
    assert (wrong["status"], wrong["param"]) == (400, "stop[1]")
    assert no_json["status"] == 400
    assert SECRET not in "".join(served.lines)
    assert answer["choices"][0]["message"]["content"] not in "".join(served.lines)


def test_prompts_and_answers_are_logged_on_demand(bundle: Path):
    with served_process(bundle, "--allow-unchecked", "--log-prompts", "--log-level", "debug") as served:
        with served.http() as client:
            answer = client.post(CHATS, json=long(1, max_tokens=5)).json()
            client.get("/health")
        end(served)
    told = [line for line in served.log if line["event"] == "request"]
    assert [line["path"] for line in told] == [CHATS, "/health"]
    assert told[0]["prompts"] == [[{"role": "user", "content": "Question 1"}]]
    assert told[0]["answers"] == [answer["choices"][0]["message"]["content"]]


# --- the end ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(number: int, bundle: Path):
    # A connection that is kept alive must not hold it up.
    with served_process(bundle, "--allow-unchecked") as served, served.http() as client:
        client.get("/health")
        assert end(served, number) == 0
    assert [line["event"] for line in served.log][-2:] == ["shutting down", "ended"]
    assert {line["level"] for line in served.log} == {"info"}


def test_told_to_end_under_load_it_finishes_what_runs_and_refuses_the_rest(
    bundle: Path, recorded_pipeline: Callable[[str], C2CPipeline]
):
    num_requests = 20
    with (
        served_process(bundle, "--allow-unchecked", "--slots", 1, "--drain", 600, held=True) as served,
        ThreadPoolExecutor(num_requests) as threads,
        served.http() as client,
    ):

        def ask(number: int) -> str:
            with served.openai() as openai:
                options: Any = long(number)
                options["extra_body"] = {"ignore_eos": options.pop("ignore_eos")}
                if number % 2:
                    return openai.chat.completions.create(**options).choices[0].message.content or ""
                stream = openai.chat.completions.create(**options, stream=True)
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        asked = [threads.submit(ask, number) for number in range(num_requests)]

        def num_taken() -> float:
            now = served.metrics()
            return now["c2c_queued_seconds_count"] + now["c2c_queue_length"]

        wait_until(lambda: num_taken() == num_requests)
        assert served.process is not None
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/ready").status_code == 503)
        refused(client.get("/ready"), 503)
        assert client.get("/health").status_code == 200
        for body in (long(99), long(99, stream=True)):
            late = client.post(CHATS, json=body)
            assert refused(late, 503)["code"] == "shutting_down"
            assert int(late.headers["retry-after"]) >= 1
        assert not any(future.done() for future in asked)
        served.release()
        answers = [future.result() for future in asked]
        assert served.process.wait(30) == 0
    pipeline = recorded_pipeline(PAIR)
    for number, answer in enumerate(answers):
        assert answer == pipeline.generate(long(number)["messages"], ignore_eos=True).text
    assert len([line for line in served.log if line["event"] == "request" and line["status"] == 200]) == num_requests


@pytest.mark.parametrize("how", ["--drain", "second signal"])
def test_what_does_not_finish_in_time_ends_with_an_error_that_says_so(how: str, bundle: Path):
    drain = 0.05 if how == "--drain" else 600
    with (
        served_process(bundle, "--allow-unchecked", "--slots", 1, "--drain", drain, held=True) as served,
        ThreadPoolExecutor(2) as threads,
        served.http() as client,
    ):
        with client.stream("POST", CHATS, json=long(0, stream=True, n=32)) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            whole = threads.submit(httpx2.post, f"{served.url}{CHATS}", json=long(1, n=16), timeout=60)
            wait_until(lambda: served.metric("c2c_queue_length") == 31 + 16)
            assert served.process is not None
            served.process.send_signal(signal.SIGTERM)
            if how == "second signal":
                wait_until(lambda: httpx2.get(f"{served.url}/ready").status_code == 503)
                served.process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        cut = json.loads(events[-1])["error"]
        assert cut["code"] == "shutting_down"
        assert "ended this request before its answer was complete" in cut["message"]
        assert refused(whole.result(), 503)["code"] == "shutting_down"
        assert served.process.wait(30) == 0
    assert {line["error"] for line in served.log if line.get("path") == CHATS} == {"shutting_down"}


def test_when_the_engine_fails_for_good_the_process_ends_with_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    engine = AsyncC2CEngine.from_bundle(bundle, num_slots=1, num_threads=1, allow_unchecked=True)

    def fail() -> bool:
        if not engine._scheduler._admission.every():
            return False  # it is to fail in the midst of a request
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(engine._scheduler, "step", fail)
    app = create_app(engine, ServerSettings())
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}{CHATS}"
        asked = threads.submit(httpx2.post, url, json=long(0), timeout=30)
        with pytest.raises(C2CError, match="the engine failed and cannot go on"):
            asyncio.run(serve._run(app, engine, listener, drain=30, max_connections=10))
        assert refused(asked.result(), 500)["code"] == "engine_failed"
    # Begun to close it is not shutting down to whoever asks.
    with served_here(engine) as served, served.http() as client:
        for closing in (False, True):
            if closing:
                begin_closing(served.app)
            assert refused(client.get("/ready"), 503)["code"] == "engine_failed"
            late = client.post(CHATS, json=long(1))
            assert refused(late, 503)["code"] == "engine_failed"
            assert int(late.headers["retry-after"]) >= 1
            assert client.get("/health").status_code == 200


def test_more_connections_than_allowed_are_refused(bundle: Path):
    with served_process(bundle, "--allow-unchecked", "--max-connections", 2) as served:
        address = ("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
        with socket.create_connection(address), served.http() as second:
            assert second.get("/health").status_code == 200
            assert httpx2.get(f"{served.url}/health").status_code == 503
            assert second.get("/health").status_code == 200
        wait_until(lambda: httpx2.get(f"{served.url}/health").status_code == 200)


# --- the start ---


def test_a_damaged_bundle_is_named_and_nothing_is_served(bundle: Path, tmp_path: Path, run_cli: RunCli):
    damaged = tmp_path / "damaged.bundle"
    shutil.copytree(bundle, damaged)
    graph = damaged / "graphs" / "receiver.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    code, out, err = run_cli("serve", damaged, "--port", 0)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {graph}: changed since the bundle was written")
    assert len(err.splitlines()) <= 2


def test_a_port_in_use_is_named_and_the_bundle_not_loaded(bundle: Path, run_cli: RunCli):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = run_cli("serve", bundle, "--port", port)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: cannot listen at port {port} of 127.0.0.1: Address already in use; choose another")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid: no such address"),
        (("--drain", "-1"), "--drain: -1.0 is not allowed"),
        (("--log-level", "loud"), "--log-level: 'loud' is not allowed; expected one of debug, info, warning, error"),
        (("--max-priority", "101"), "--max-priority: 101 is not allowed; expected -100 to 100"),
        (("--max-connections", "0"), "--max-connections: 0 is not allowed"),
        (("--max-tokens", "0"), "--max-tokens: 0 is not allowed"),
        (("--max-body", "0"), "--max-body: 0 is not allowed"),
        (
            ("--timeout", "-1"),
            "--timeout: -1.0 is not allowed; expected a number of seconds, or 0 for as many as it takes",
        ),
        (("--max-stall", "0"), "--max-stall: 0.0 is not allowed"),
        (("--max-waiting", "-1"), "--max-waiting: -1 is not allowed"),
        (("--api-key", "two words"), "--api-key: a key is empty, or has"),
        (("--slots", "0"), "--slots is 0, "),
        (("--threads", "0"), "--threads is 0, "),
        (("--port", "70000"), "'--port': "),
    ],
)
def test_options_out_of_range_are_named(options: tuple[str, ...], message: str, bundle: Path, run_cli: RunCli):
    code, out, err = run_cli("serve", bundle, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_keys_come_from_the_environment_and_from_options(bundle: Path):
    keys, options = {"C2C_EXPORT_API_KEYS": "one two"}, ("--allow-unchecked", "--api-key", "three")
    with served_process(bundle, *options, environment=keys) as served, served.http() as client:
        assert client.get("/v1/models").status_code == 401
        for key in ("one", "two", "three"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert "one" not in " ".join(line["event"] for line in served.log)


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_environment_does_not_open_the_server(
    blank: str, bundle: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("C2C_EXPORT_API_KEYS", blank)
    for options in ((), ("--api-key", "one")):
        code, _, err = run_cli("serve", bundle, "--drain", "-1", *options)
        assert code == 2
        assert "C2C_EXPORT_API_KEYS: this environment variable is set but blank" in err


def test_a_missing_library_is_named_with_what_installs_it(bundle: Path):
    code = "import sys; sys.modules['uvicorn'] = None; from c2c_export.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(bundle)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "this command needs uvicorn" in done.stderr
    assert "pip install -c constraints.txt '.[serve]'" in done.stderr


def test_an_engine_that_was_never_checked_is_warned_of_at_the_start(bundle: Path):
    with served_process(bundle) as served:
        assert served.process is not None
        assert end(served) == 0
        assert served.process.stderr is not None
        told = served.process.stderr.read()
    assert told.startswith("warning: ")
    assert "never checked" in told
    assert f"Serving {bundle} at {served.url}" in told
