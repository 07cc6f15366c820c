"""What runs in the replicas of a Ray cluster: a whole pipeline, a pipeline without its sharers, or one sharer.

In: what `RayArguments` says, and calls of Serve handles. Out: answers, and rows. Not covered: HTTP
(`runtime.server.ray_app`), and the sides that call (`runtime.server.ray.replicated_engine`,
`runtime.server.ray.remote_sharers`).
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from c2c_export.errors import C2CError, UsageError, reason_of
from runtime.async_engine import AsyncC2CEngine
from runtime.generation import Chunk, Generation
from runtime.kept_rows import SharerRows
from runtime.prompt import ModelTokens
from runtime.request import Request
from runtime.server.logs import log_as_json
from runtime.server.metrics import ServerMetrics
from runtime.server.ray.arguments import RayArguments
from runtime.server.ray.metrics import RayMetricMaker
from runtime.server.ray.remote_sharers import RemoteSharers
from runtime.server.ray.replicated_engine import ReplicaFacts
from runtime.sharer_engine import SharerEngine

_MAX_FAILURES = 3
"""Prompts that fail one after the other: their own fault is not likely any more."""


class PipelineReplica:
    """An engine of its own: of the whole pipeline or, where sharers are given, of all but them."""

    def __init__(self, arguments: RayArguments, *sharers: DeploymentHandle[Any]) -> None:
        """`sharers` are the handles of deployments of `SharerReplica`, in the order of `arguments.sharer_numbers`."""
        _log(arguments)
        self._sharers = RemoteSharers(dict(zip(arguments.sharer_numbers, sharers, strict=True)))
        self._metrics = ServerMetrics(RayMetricMaker())
        self._engine = AsyncC2CEngine.from_bundle(
            arguments.bundle,
            arguments.engine,
            arguments.precision,
            num_slots=arguments.num_slots,
            num_threads=arguments.num_threads,
            allow_unchecked=arguments.allow_unchecked,
            allow_failed=arguments.allow_failed,
            load_sharers=not sharers,
            options=arguments.scheduler,
            observer=self._metrics,
        )

    def facts(self) -> ReplicaFacts:
        """What this replica runs."""
        return ReplicaFacts(self._engine.engine_choice, self._engine.num_slots)

    async def generate(self, request: Request, key: str) -> Generation | C2CError:
        """As `AsyncC2CEngine.generate`, with its errors as values; `key` is that of the request's conversation.

        Serve logs what is raised, with its message, which may quote a prompt.
        """
        try:
            async with self._with_sharers(request, key) as ready:
                return await self._engine.generate(ready)
        except C2CError as error:
            return error

    async def stream(self, request: Request, key: str) -> AsyncGenerator[Chunk | C2CError, None]:
        """As `AsyncC2CEngine.stream`, with an error as the last value; `key` as that of `generate`."""
        try:
            async with self._with_sharers(request, key) as ready, aclosing(self._engine.stream(ready)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except C2CError as error:
            yield error

    def check_health(self) -> None:
        """Serve calls this now and then, and replaces a replica where it raises."""
        self._metrics.read_engine(self._engine)
        if not self._engine.ready:
            raise C2CError("the engine failed, or is closing")

    async def __del__(self) -> None:
        """Serve calls this once no request runs, or none may run any longer."""
        await self._engine.close(0)

    @asynccontextmanager
    async def _with_sharers(self, request: Request, key: str) -> AsyncIterator[Request]:
        if not self._sharers.numbers:
            yield request
            return
        async with self._sharers.reading(key) as read_sharers:
            yield replace(request, read_sharers=read_sharers)


class SharerReplica:
    """One sharer, which reads prompts."""

    def __init__(self, arguments: RayArguments, number: int) -> None:
        """`number` is the sharer's."""
        _log(arguments)
        self._failures: list[Exception] = []
        """Since the last prompt that was read."""
        self._engine = SharerEngine.from_bundle(
            arguments.bundle,
            number,
            arguments.engine,
            arguments.precision,
            num_slots=arguments.num_slots,
            num_threads=arguments.num_threads,
            allow_unchecked=arguments.allow_unchecked,
            allow_failed=arguments.allow_failed,
        )

    async def prefill(self, tokens: ModelTokens) -> SharerRows:
        """The rows of `tokens`; what Ray hands over are arrays in its object store."""
        try:
            rows = await asyncio.to_thread(self._engine.prefill, tokens)
        except UsageError:
            raise  # the prompt's fault
        except Exception as error:
            self._failures.append(error)
            raise
        self._failures.clear()
        return rows

    def check_health(self) -> None:
        """Serve calls this now and then, and replaces a replica where it raises: when prompt after prompt fails."""
        if len(self._failures) >= _MAX_FAILURES:
            raise C2CError(f"the last {len(self._failures)} prompts failed; {reason_of(self._failures[-1])}")


def _log(arguments: RayArguments) -> None:
    """Let warnings and logs of this process be lines of JSON, and not quote prompts unless they may."""
    log_as_json(sys.stdout, arguments.log_level, prompts=arguments.settings.log_prompts)
