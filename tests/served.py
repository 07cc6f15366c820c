"""Servers for tests, on sockets of 127.0.0.1: an application in a thread of this process, or a process of its own."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from runtime.async_engine import AsyncC2CEngine
from runtime.server.app import create_app
from runtime.server.metrics import ServerMetrics
from runtime.server.settings import ServerSettings

ROOT = Path(__file__).parents[1]
START_SECONDS = 120


class PacedMetrics(ServerMetrics):
    """Lets every token take `seconds` more, so that a tiny model is as slow as a large one."""

    seconds = 0.0

    def next_token(self, seconds: float) -> None:
        time.sleep(self.seconds)
        super().next_token(seconds)


@dataclass
class Served:
    """A server that listens at `url`."""

    url: str
    engine: AsyncC2CEngine | None = None
    process: subprocess.Popen[str] | None = None
    lines: list[str] = field(default_factory=list)
    """What the process wrote to stdout so far."""
    app: FastAPI | None = None
    server: uvicorn.Server | None = None

    def release(self) -> None:
        """Let the answers of a process that was held go on."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()

    def openai(self, api_key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **options)

    def cut_connections(self) -> None:
        """Break every connection to a server of this process, as when a cable is pulled."""
        assert self.server is not None
        for connection in list(self.server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)  # type: ignore[union-attr]  # not WebSockets

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.lines)]

    def metric(self, name: str, **labels: str) -> float:
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        return self.metrics()[f"{name}{{{shown}}}" if labels else name]

    def metrics(self) -> dict[str, float]:
        """All of one moment, by name with labels."""
        with self.http() as client:
            lines = client.get("/metrics").text.splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in samples}


@contextmanager
def served_here(engine: AsyncC2CEngine, metrics: ServerMetrics | None = None, **settings: Any) -> Iterator[Served]:
    """An application over `engine`, which stays open."""
    app = create_app(engine, ServerSettings(**settings), metrics)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, http="h11", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Served(
            f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", engine, app=app, server=server
        )
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def served_process(
    bundle: Path, *options: object, environment: dict[str, str] | None = None, held: bool = False
) -> Iterator[Served]:
    """`c2c-export serve` on a free port; killed at the end if it still runs.

    Where it is `held`, no answer goes on behind its first token until `release` is called.
    """
    program = [ROOT / "tests" / "held_server.py"] if held else ["-m", "c2c_export.cli"]
    command = [sys.executable, *program, "serve", bundle, "--port", 0, "--threads", 1, *options]
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdin=subprocess.PIPE if held else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    served = Served("", process=process)
    assert process.stdout is not None

    def collect() -> None:
        for line in process.stdout:  # type: ignore[union-attr]
            served.lines.append(line)

    reader = threading.Thread(target=collect)
    reader.start()
    try:
        wait_until(lambda: bool(served.lines) or process.poll() is not None, START_SECONDS)
        assert served.lines, process.communicate()[1]
        served.url = served.log[0]["url"]
        yield served
    finally:
        process.kill()
        process.wait()
        reader.join()
        if process.stdin is not None:
            process.stdin.close()
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()


def wait_until(happened: Callable[[], bool], seconds: float = 30) -> None:
    """Raise an AssertionError if it does not happen in time."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def refused(response: Any, status: int) -> dict[str, Any]:
    """The error of a response that has this status, in OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    assert response.headers["x-request-id"]
    return error
