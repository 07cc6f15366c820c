"""`ReplicatedEngine`: to the HTTP application what an `AsyncC2CEngine` is, over replicas of it in a Ray cluster.

In: requests, and the handle of a Serve deployment whose replicas each hold an `AsyncC2CEngine`
(`runtime.server.ray.replicas`). Out: answers and errors as those of one engine. The requests of one conversation go to
one replica as long as it lives and has room. A replica that dies loses none of them: they are generated again by
another one, a stream goes on behind what was delivered. Not covered: the death of the process that holds this engine,
which breaks its clients' connections.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from c2c_export.bundle import Bundle
from c2c_export.errors import C2CError, UsageError
from engines.select import EngineChoice
from runtime.bundle_planner import BundlePlanner
from runtime.generation import Chunk, Generation
from runtime.request import AbortedError, ClosedError, DeadlineError, Request, new_request_id
from runtime.server.ray.affinity import affinity_key
from runtime.server.ray.replica_calls import LostReplicas, ReplicaLostError, own_error
from runtime.server.ray.resumption import Resumption

_log = logging.getLogger(__name__)

_GRACE = 1.0
"""Seconds behind a request's deadline in which its replica may still say itself that it passed."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class ReplicaFacts:
    """What all replicas of a pipeline have in common."""

    engine_choice: EngineChoice
    num_slots: int


class ReplicatedEngine:
    """See the module's docstring. Its methods are for one event loop."""

    def __init__(self, bundle: Bundle, replicas: DeploymentHandle[Any], facts: ReplicaFacts) -> None:
        """`replicas` is the handle of a deployment of `PipelineReplica`, `facts` what one of them told."""
        self.bundle = bundle
        self.engine_choice = facts.engine_choice
        self.num_slots = facts.num_slots
        """Of one replica."""
        self._tokenizer = BundlePlanner(bundle).receiver_tokenizer
        self._replicas = replicas
        self._calls: dict[str, _Call] = {}
        self._closed = False

    @classmethod
    async def connect(cls, bundle: Bundle, replicas: DeploymentHandle[Any]) -> "ReplicatedEngine":
        """Wait until a replica runs, and ask it what it is. Raises `C2CError` where none can be deployed."""
        lost = LostReplicas(f"asking a replica of {replicas.deployment_name} what it runs")
        while True:
            try:
                return cls(bundle, replicas, await _result(replicas.facts.remote(), replicas.deployment_name))
            except ReplicaLostError as error:
                await asyncio.sleep(lost.add(error))

    @property
    def num_active(self) -> int:
        """Requests that came this way and are not done, those that wait in a replica included."""
        return len(self._calls)

    @property
    def num_free_slots(self) -> int:
        """Always 0: which slots are free, their replicas know."""
        return 0

    @property
    def num_requests(self) -> int:
        """As `num_active`."""
        return len(self._calls)

    @property
    def num_waiting(self) -> int:
        """Always 0: which requests wait, their replicas know."""
        return 0

    @property
    def ready(self) -> bool:
        """Whether requests are taken. Whether a replica lives is not known, and Serve starts others."""
        return not self._closed

    def tokenize(self, text: str) -> list[int]:
        """The receiver's ids of a text, special tokens in it parsed."""
        return list(self._tokenizer.encode(text).ids)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself."""
        return self._tokenizer.backend.decode([token_id], skip_special_tokens=False)

    async def generate(self, request: Request) -> Generation:
        """The whole answer; errors are those of `AsyncC2CEngine.generate`."""
        with self._call(request) as call:
            handle = self._replicas.options(method_name="generate", session_id=call.key)
            while True:
                call.send(handle)
                try:
                    generation: Generation = await call.wait_for(call.response)
                    call.response = None
                    return generation
                except ReplicaLostError as error:
                    await call.pause_after(error)

    async def stream(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """The answer in pieces, as `AsyncC2CEngine.stream` gives it; closing the generator early aborts the request."""
        resumption = Resumption()
        with self._call(request) as call:
            handle = self._replicas.options(method_name="stream", session_id=call.key, stream=True)
            while True:
                call.send(handle)
                resumption.restart()
                try:
                    while True:
                        chunk: Chunk = await call.wait_for(anext(call.response))
                        rest = resumption.advance(chunk)
                        if chunk.generation is not None:
                            call.response = None
                        if rest is not None:
                            yield rest
                        if chunk.generation is not None:
                            return
                except ReplicaLostError as error:
                    await call.pause_after(error)

    def abort(self, request_id: str) -> bool:
        """End a request with an `AbortedError`; whether it was there."""
        call = self._calls.get(request_id)
        if call is None:
            return False
        call.abort(AbortedError(f"request {request_id} was aborted"))
        return True

    async def close(self, drain_seconds: float | None = None) -> None:
        """Take no more requests, and wait for those that run; after `drain_seconds` the rest end with `ClosedError`."""
        self._closed = True
        started = time.monotonic()
        while self._calls:
            if drain_seconds is not None and time.monotonic() - started > drain_seconds:
                for call in self._calls.values():
                    call.abort(ClosedError("the server is closing"))
                drain_seconds = None
            await asyncio.sleep(0.05)

    @contextmanager
    def _call(self, request: Request) -> Iterator["_Call"]:
        if self._closed:
            raise ClosedError("the server is closing and takes no more requests")
        if request.request_id in self._calls:
            raise UsageError(f"request_id: {request.request_id!r} is in use by another request")
        call = _Call(request, self._replicas.deployment_name)
        self._calls[request.request_id] = call
        try:
            yield call
        finally:
            del self._calls[request.request_id]
            call.cancel()


class _Call:
    """A request under way: what it asks of a replica, and Serve's response for the present try.

    Each try has an id of its own, the first one the request's: a replica that only seemed to be lost may be at work on
    the last one when it gets the next.
    """

    def __init__(self, request: Request, deployment: str) -> None:
        self._deployment = deployment
        self._request = _repeatable(request)
        self._id = request.request_id
        self._started = time.monotonic()
        self._ended_with: Exception | None = None
        self._ended = asyncio.Event()
        self._lost = LostReplicas(f"request {request.request_id}")
        self.key = affinity_key(request)
        self.response: Any = None
        """What Serve gave for it; None once nothing is at work on it."""

    def send(self, handle: DeploymentHandle[Any]) -> None:
        """Let a replica begin the request."""
        # Serve takes calls that are made within one HTTP request, such as those for its several answers, for one call,
        # and gives a replica to only one of those that wait for it. It knows by context variables what a call is made
        # within; an empty context has none.
        self.response = Context().run(handle.remote, self._request_now(), self.key)

    def _request_now(self) -> Request:
        """The request to send: under the present try's id, with what is left of its deadline."""
        if self._request.deadline is None:
            return self._request
        # A deadline that has passed is the replica's to refuse; it must only be above 0.
        return replace(self._request, deadline=max(self._seconds_left(self._request.deadline), 1e-3))

    async def wait_for(self, awaitable: Awaitable[_T]) -> _T:
        """What a replica answers. Raises its error, `ReplicaLostError`, or `DeadlineError` where none is found.

        Once the request was aborted, what it was aborted with, whatever the replica had answered by then.
        """
        deadline = self._request.deadline
        timeout = None if deadline is None else self._seconds_left(deadline) + _GRACE
        try:
            async with asyncio.timeout(timeout):
                result = await _result(awaitable, self._deployment)
        except TimeoutError as error:
            raise DeadlineError(f"the deadline of {deadline} s passed before the request was done") from error
        except Exception as error:
            raise (self._ended_with or error) from error
        if self._ended_with is not None:
            raise self._ended_with
        return result

    async def pause_after(self, error: ReplicaLostError) -> None:
        """Wait until the request may be sent again, not beyond its deadline, and give that try an id of its own.

        Raises `C2CError` where it is given up, and what it was aborted with meanwhile.
        """
        self.response = None
        pause, deadline = self._lost.add(error), self._request.deadline
        if deadline is not None:
            pause = min(pause, max(self._seconds_left(deadline), 0))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), pause)
        if self._ended_with is not None:
            raise self._ended_with
        self._request = replace(self._request, request_id=new_request_id())
        fields = {"request_id": self._id, "sent_as": self._request.request_id}
        _log.info("a request is sent again", extra={"fields": fields})

    def abort(self, error: Exception) -> None:
        """Let the request end with `error`."""
        self._ended_with = error
        self._ended.set()
        self.cancel()

    def cancel(self) -> None:
        """Let the replica stop, if it is at work."""
        if self.response is not None:
            self.response.cancel()

    def _seconds_left(self, deadline: float) -> float:
        return deadline - (time.monotonic() - self._started)


async def _result(awaitable: Awaitable[_T], deployment: str) -> _T:
    """What a call gives, of which an error is raised (`PipelineReplica.generate`)."""
    try:
        result = await awaitable
    except Exception as error:
        raise own_error(error, deployment) from error
    if isinstance(result, C2CError):
        raise own_error(result, deployment)
    return result


def _repeatable(request: Request) -> Request:
    """The request with a seed, so that every replica gives the same answer."""
    sampling = request.sampling
    if sampling.greedy or sampling.seed is not None:
        return request
    return replace(request, sampling=replace(sampling, seed=secrets.randbits(63)))
