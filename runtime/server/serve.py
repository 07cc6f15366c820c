"""The server as a process: it loads a bundle, listens, and ends in good order when it is told to.

In: `ServeOptions`. Out: nothing, when a signal ended it and all was answered; `C2CError` where it could not begin. On
SIGTERM or SIGINT it refuses new requests with 503, finishes those that run within `drain` seconds, and ends the rest
with an error that says so; a second signal does not wait. When the engine fails for good, it ends too, with an error,
so that whoever watches over the process begins it anew. Log lines are JSON, on stdout. Not covered: the routes
(`runtime.server.app`).
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn
from fastapi import FastAPI

from c2c_export.errors import C2CError, UsageError
from runtime.async_engine import AsyncC2CEngine
from runtime.scheduler_options import SchedulerOptions
from runtime.server.app import begin_closing, create_app
from runtime.server.logs import LEVELS, log_as_json
from runtime.server.metrics import ServerMetrics
from runtime.server.request_log import log
from runtime.server.settings import ServerSettings

_BACKLOG = 2048
_LAST_ANSWERS = 5
"""Seconds for what is to be sent when nothing is computed any more."""
_ENGINE_CHECK = 0.5
"""Seconds between two looks at whether the engine still works."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Raises `UsageError`, naming the option, for a value out of range."""

    bundle: str | os.PathLike[str]
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    engine: str = "ort-cpu"
    precision: str | None = None
    num_threads: int | None = None
    num_slots: int = 8
    allow_unchecked: bool = False
    allow_failed: bool = False
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    settings: ServerSettings = field(default_factory=ServerSettings)
    drain: float = 30.0
    """Seconds that running requests have to finish when the process is told to end."""
    max_connections: int = 1000
    """Idle ones included; what comes beyond them is answered with a 503."""
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not 0 <= self.drain < float("inf"):
            raise UsageError(f"drain: {self.drain!r} is not allowed; expected a number of seconds, 0 or more")
        if self.max_connections < 1:
            raise UsageError(
                f"max_connections: {self.max_connections} is not allowed; expected an integer of at least 1"
            )
        if self.log_level not in LEVELS:
            raise UsageError(f"log_level: {self.log_level!r} is not allowed; expected one of {', '.join(LEVELS)}")


def serve(options: ServeOptions, tell: Callable[[str], None]) -> None:
    """Serve until a signal; `tell` gets what a person at the terminal wants to know at the start.

    Raises `C2CError` where the port is taken, `BundleError` for a damaged bundle, and what loading an engine raises.
    """
    with _bind(options.host, options.port) as listener:
        metrics = ServerMetrics()
        engine = AsyncC2CEngine.from_bundle(
            options.bundle,
            options.engine,
            options.precision,
            num_slots=options.num_slots,
            num_threads=options.num_threads,
            allow_unchecked=options.allow_unchecked,
            allow_failed=options.allow_failed,
            options=options.scheduler,
            observer=metrics,
        )
        settings = replace(options.settings, max_waiting=options.scheduler.max_waiting)
        app = create_app(engine, settings, metrics)
        if "auto" in (options.engine, options.precision):
            tell(f"engine: {engine.engine_choice.reason}")
        # Only now, so that clients that come too early are refused rather than kept waiting.
        with _port_errors(options.host, options.port):
            listener.listen(_BACKLOG)
        tell(f"Serving {engine.bundle.root} at {_url(listener)}; Ctrl-C ends it")
        log_as_json(sys.stdout, options.log_level, prompts=options.settings.log_prompts)
        asyncio.run(_run(app, engine, listener, options.drain, options.max_connections))


async def _run(
    app: FastAPI, engine: AsyncC2CEngine, listener: socket.socket, drain: float, max_connections: int
) -> None:
    """Serve until a signal comes or the engine fails. Raises `C2CError` in the latter case."""
    server = _Server(_config(app, max_connections))
    told, told_again = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (told_again if told.is_set() else told).set()

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop)
    # Whoever reads this may send a signal at once.
    record = engine.engine_choice.record
    where = {"url": _url(listener), "engine": record.target, "precision": record.precision}
    log.info("listening", extra={"fields": where})
    serving = asyncio.create_task(server.serve([listener]))
    failure = asyncio.create_task(_failure_of(engine))
    await _first_of(serving, failure, asyncio.create_task(told.wait()))
    failed = failure.done()
    begin_closing(app)
    load = {"active": engine.num_active, "waiting": engine.num_waiting, "drain": drain}
    log.info("shutting down", extra={"fields": load})
    closing = asyncio.create_task(engine.close(drain_seconds=drain))
    await _first_of(closing, asyncio.create_task(told_again.wait()))
    if not closing.done():
        await engine.close(drain_seconds=0)
    await closing
    server.should_exit = True
    await serving
    failure.cancel()
    log.info("ended")
    if failed:
        raise C2CError("the engine failed and cannot go on; the log says where")


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    """Wait for one of them; `asyncio.run` sees to those that nobody waits for any more."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _config(app: FastAPI, max_connections: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",  # always there; with others a request might be read in another way on another machine
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=max_connections + 1,  # uvicorn counts the one that it refuses
        timeout_graceful_shutdown=_LAST_ANSWERS,
    )


async def _failure_of(engine: AsyncC2CEngine) -> None:
    """Return when the engine takes no requests any more, although nobody closed it."""
    while engine.ready:
        await asyncio.sleep(_ENGINE_CHECK)


class _Server(uvicorn.Server):
    """Leaves signals to us: its own handlers would end it before the engine is done, and then raise them again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


def _bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which does not listen yet. Raises `UsageError` for no host, `C2CError` for no port."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host}: no such address; expected a name or an address of this machine") from error
    listener = socket.socket(family, kind)
    try:
        with _port_errors(host, port):
            # A port whose former connections are still winding down is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except C2CError:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _port_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise C2CError(
            f"cannot listen at port {port} of {host}: {error.strerror}; choose another with --port or --host"
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
