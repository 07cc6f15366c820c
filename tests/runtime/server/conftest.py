"""Fixtures of the server's tests: one engine over a recorded pair, and an application over it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served import Served, served_here

from runtime.async_engine import AsyncC2CEngine
from runtime.server.metrics import ServerMetrics

PAIR = "qwen3_from_llama_aligned"


@pytest.fixture(scope="session")
def metrics() -> ServerMetrics:
    """Those of `engine`."""
    return ServerMetrics()


@pytest.fixture(scope="session")
def engine(recorded_bundle: Callable[[str], Path], metrics: ServerMetrics) -> Iterator[AsyncC2CEngine]:
    """Four slots over the recorded pair."""
    engine = AsyncC2CEngine.from_bundle(
        recorded_bundle(PAIR), num_slots=4, num_threads=1, allow_unchecked=True, observer=metrics
    )
    yield engine
    engine.close_and_wait(drain_seconds=0)


@pytest.fixture(scope="session")
def server(engine: AsyncC2CEngine, metrics: ServerMetrics) -> Iterator[Served]:
    """An application over `engine` with the default settings; the models are PAIR and PAIR-receiver."""
    with served_here(engine, metrics) as served:
        yield served
