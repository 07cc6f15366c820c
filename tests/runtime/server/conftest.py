"""Fixtures of the server's tests: one engine over a recorded pair, and an application over it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served import PacedMetrics, Served, served_here

from runtime.async_engine import AsyncC2CEngine

PAIR = "qwen3_from_llama_aligned"


@pytest.fixture(scope="session")
def metrics() -> PacedMetrics:
    """Those of `engine`."""
    return PacedMetrics()


@pytest.fixture(scope="session")
def engine(recorded_bundle: Callable[[str], Path], metrics: PacedMetrics) -> Iterator[AsyncC2CEngine]:
    """Four slots over the recorded pair."""
    engine = AsyncC2CEngine.from_bundle(
        recorded_bundle(PAIR), num_slots=4, num_threads=1, allow_unchecked=True, observer=metrics
    )
    yield engine
    engine.close_and_wait(drain_seconds=0)


@pytest.fixture(scope="session")
def server(engine: AsyncC2CEngine, metrics: PacedMetrics) -> Iterator[Served]:
    """An application over `engine` with the default settings; the models are PAIR and PAIR-receiver."""
    with served_here(engine, metrics) as served:
        yield served


@pytest.fixture
def pace(metrics: PacedMetrics) -> Iterator[Callable[[float], None]]:
    """Sets how many seconds more every token takes, until the test ends."""

    def set_pace(seconds: float) -> None:
        metrics.seconds = seconds

    yield set_pace
    metrics.seconds = 0.0
