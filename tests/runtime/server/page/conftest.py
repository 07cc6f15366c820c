"""Fixtures of the page's tests: a browser, and a server over a pair with two sharers that can be slowed down."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from chat_page import ChatPage
from chromium import running_chromium, visit
from playwright.sync_api import Browser
from served import Served, served_here

from runtime.async_engine import AsyncC2CEngine
from runtime.scheduler import SchedulerOptions
from runtime.server.metrics import ServerMetrics

PAIR = "two_sharers_parallel"
OpenPage = Callable[..., ChatPage]


class PacedMetrics(ServerMetrics):
    """Lets every token take `seconds` more, so that a tiny model is as slow as a large one."""

    seconds = 0.0

    def next_token(self, seconds: float) -> None:
        time.sleep(self.seconds)
        super().next_token(seconds)


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
def pace(metrics: PacedMetrics) -> Iterator[Callable[[float], None]]:
    """Sets how many seconds more every token takes, until the test ends."""

    def set_pace(seconds: float) -> None:
        metrics.seconds = seconds

    yield set_pace
    metrics.seconds = 0.0


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
