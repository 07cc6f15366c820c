"""What an ingress does about the replicas that it calls, without a cluster: here they are futures."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from c2c_export.bundle import Bundle
from engines.select import EngineChoice
from runtime import AbortedError, C2CError, Chunk, ClosedError, Generation, Request, UsageError
from runtime.generation import Timings
from runtime.server.ray import replica_calls
from runtime.server.ray.replica_calls import LostReplicas, ReplicaClosingError, ReplicaLostError
from runtime.server.ray.replicated_engine import ReplicaFacts, ReplicatedEngine

PAIR = "qwen3_from_llama_aligned"
GENERATION = Generation("Hi", [1, 2], "stop", Timings(0.0, 0.0, 0.0, 0.1, 0.1))

pytestmark = pytest.mark.xdist_group(PAIR)


class Stream:
    """What a handle gives for a stream."""

    def __init__(self, chunks: AsyncGenerator[Chunk, None]) -> None:
        self._chunks = chunks

    def __anext__(self) -> Awaitable[Chunk]:
        return self._chunks.__anext__()

    def cancel(self) -> None:
        """What is under way comes nevertheless."""


class Replicas:
    """A handle, whose calls end with `errors`, one after the other, and then with a generation."""

    deployment_name = "Pipeline"

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self._streams = False
        self.sent: list[Request] = []

    def options(self, *, stream: bool = False, **_: Any) -> "Replicas":
        self._streams = stream
        return self

    def remote(self, request: Request, key: str) -> Any:
        self.sent.append(request)
        if self._streams:
            return Stream(self._chunks())
        answer = asyncio.get_running_loop().create_future()
        if self._errors:
            answer.set_exception(self._errors.pop(0))
        else:
            answer.set_result(GENERATION)
        return answer

    async def _chunks(self) -> AsyncGenerator[Chunk, None]:
        yield Chunk("H", [1])
        if self._errors:
            raise self._errors.pop(0)
        yield Chunk("i", [2])
        yield Chunk("", [], GENERATION)


@pytest.fixture
def engine_over(
    recorded_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Replicas], ReplicatedEngine]:
    monkeypatch.setattr(replica_calls, "PAUSES", (0.001, 0.001, 0.001))
    bundle = Bundle.open(recorded_bundle(PAIR))
    facts = ReplicaFacts(EngineChoice("ort-cpu", "fp32", bundle.manifest.engines["ort-cpu-fp32"], "as asked"), 4)
    return lambda replicas: ReplicatedEngine(bundle, replicas, facts)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [RayActorError(), ClosedError("the engine is closing")])
def test_each_try_has_an_id_of_its_own(error: Exception, engine_over: Callable[[Replicas], ReplicatedEngine]):
    request = Request(prompt="Hi", request_id="mine")
    for streamed in (False, True):
        replicas = Replicas(error, error)
        engine = engine_over(replicas)

        async def ask(engine: ReplicatedEngine = engine, streamed: bool = streamed) -> Generation | None:
            if not streamed:
                return await engine.generate(request)
            return [chunk.generation async for chunk in engine.stream(request)][-1]

        assert asyncio.run(ask()) == GENERATION
        ids = [sent.request_id for sent in replicas.sent]
        assert ids[0] == "mine"
        assert len(set(ids)) == 3
        assert {sent.prompt for sent in replicas.sent} == {"Hi"}
        assert engine.num_active == 0


def test_a_request_is_aborted_by_its_own_id_whatever_was_answered(engine_over: Callable[[Replicas], ReplicatedEngine]):
    replicas = Replicas(RayActorError())
    engine = engine_over(replicas)

    texts = []

    async def ask() -> None:
        async for chunk in engine.stream(Request(prompt="Hi", request_id="mine")):
            texts.append(chunk.text)
            if len(replicas.sent) == 2:
                assert replicas.sent[1].request_id != "mine"
                assert engine.abort("mine")

    with pytest.raises(AbortedError):
        asyncio.run(ask())
    assert texts == ["H", "i"]
    assert not engine.abort("mine")


def test_an_id_in_use_is_refused_as_by_an_engine(engine_over: Callable[[Replicas], ReplicatedEngine]):
    engine = engine_over(Replicas())

    async def ask() -> None:
        request = Request(prompt="Hi", request_id="mine")
        chunks = engine.stream(request)
        await anext(chunks)
        with pytest.raises(UsageError, match="'mine' is in use"):
            await engine.generate(request)
        await chunks.aclose()
        assert await engine.generate(request) == GENERATION

    asyncio.run(ask())


def test_a_replica_that_stays_closed_is_not_asked_for_ever(
    engine_over: Callable[[Replicas], ReplicatedEngine], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replica_calls, "CLOSING_SECONDS", 0.01)
    replicas = Replicas(*[ClosedError("the engine is closing")] * 1000)
    with pytest.raises(
        C2CError, match=r"request mine: replicas were closing .* in 0\.01 s, it is given up; .* closing"
    ):
        asyncio.run(engine_over(replicas).generate(Request(prompt="Hi", request_id="mine")))
    assert 9 <= len(replicas.sent) <= 12


def test_replicas_that_are_being_stopped_count_by_time_and_others_by_number():
    lost = LostReplicas("a call")
    closing = ReplicaClosingError("it is closing")
    assert sum(lost.add(closing) for _ in range(290)) == pytest.approx(58)
    with pytest.raises(C2CError, match="a call: replicas were closing whenever it was made in 60 s, it is given up"):
        [lost.add(closing) for _ in range(20)]
    lost = LostReplicas("a call")
    assert tuple(lost.add(ReplicaLostError("it died")) for _ in range(3)) == replica_calls.PAUSES
    with pytest.raises(C2CError, match="a call: 4 replicas were lost over it, it is given up"):
        lost.add(ReplicaLostError("it died"))
