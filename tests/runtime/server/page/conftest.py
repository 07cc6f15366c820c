"""Fixtures of the page's tests: a browser, and a server over a pair with two sharers that can be slowed down."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chat_page import ChatPage
from chromium import running_chromium, visit
from decode_gate import DecodeGate
from playwright.sync_api import Browser
from served import PacedMetrics, Served, served_here, wait_until

from runtime.async_engine import AsyncC2CEngine
from runtime.scheduler_options import SchedulerOptions

PAIR = "two_sharers_parallel"
OpenPage = Callable[..., ChatPage]
Occupied = Callable[[int], AbstractContextManager[Callable[[], None]]]


def occupy(server: Served, stop: threading.Event) -> None:
    """One streamed request that goes on until `stop` is set."""
    stream = server.openai().chat.completions.create(
        model=PAIR,
        messages=[{"role": "user", "content": "Tell me everything."}],
        max_tokens=200,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in stream:
        if stop.is_set():
            stream.close()
            return


@contextmanager
def occupying(server: Served, num_requests: int) -> Iterator[Callable[[], None]]:
    """So many requests are under way, and no request is done, until what is given is called, which ends them."""
    assert server.engine is not None
    stop = threading.Event()
    with ThreadPoolExecutor(num_requests) as pool, DecodeGate(server.engine) as gate:

        def release() -> None:
            stop.set()
            gate.open()

        requests: list[Future[Any]] = []
        try:
            for number in range(num_requests):
                requests.append(pool.submit(occupy, server, stop))
                # Several at once would be refused while slots are free, as each is in the queue for a moment.
                wait_until(lambda taken=number + 1: server.engine.num_active + server.engine.num_waiting == taken)
            yield release
        finally:
            release()
            for request in requests:
                request.result()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def metrics() -> PacedMetrics:
    return PacedMetrics()


@pytest.fixture(scope="module")
def engine(recorded_bundle: Callable[[str], Path], metrics: PacedMetrics) -> Iterator[AsyncC2CEngine]:
    """Two slots, and two requests may wait."""
    engine = AsyncC2CEngine.from_bundle(
        recorded_bundle(PAIR),
        num_slots=2,
        num_threads=1,
        allow_unchecked=True,
        options=SchedulerOptions(max_waiting=2),
        observer=metrics,
    )
    yield engine
    engine.close_and_wait(drain_seconds=0)


@pytest.fixture(scope="module")
def server(engine: AsyncC2CEngine, metrics: PacedMetrics) -> Iterator[Served]:
    with served_here(engine, metrics) as served:
        yield served


@pytest.fixture
def occupied(server: Served) -> Occupied:
    """Keeps so many requests under way while its context lasts, or until what it gives is called."""
    return partial(occupying, server)


@pytest.fixture
def open_page(browser: Browser, server: Served) -> Iterator[OpenPage]:
    """Opens the page of `server`, or of another one; fails at the end for what the browser complained of."""
    with ExitStack() as opened:

        def open_(served: Served = server, **options: Any) -> ChatPage:
            return ChatPage(opened.enter_context(visit(browser, served.url, **options)))

        yield open_


@pytest.fixture
def chat(open_page: OpenPage) -> ChatPage:
    """The page, ready for questions."""
    chat = open_page()
    chat.wait_until_ready()
    return chat
