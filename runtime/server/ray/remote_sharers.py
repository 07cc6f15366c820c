"""The sharers of a bundle where each is a Serve deployment of `SharerReplica`: their rows come as Ray objects.

In: what each sharer reads of a prompt. Out: for each a future of its rows, whose arrays lie in the node's object store:
read-only and, where the sharer's replica is on the same node, never copied on the way. A replica that dies is replaced
by another one. Not covered: what becomes of the rows (`runtime.prefill`).
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from ray.serve.handle import DeploymentHandle

from runtime.kept_rows import SharerRows
from runtime.prompt import ModelTokens
from runtime.request import AbortedError, ReadSharers
from runtime.server.ray.replica_calls import LostReplicas, ReplicaLostError, own_error


class RemoteSharers:
    """See the module's docstring. For one event loop."""

    def __init__(self, handles: Mapping[int, DeploymentHandle[Any]]) -> None:
        """`handles` by sharer number."""
        self._handles = dict(handles)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The sharers' numbers."""
        return tuple(self._handles)

    @asynccontextmanager
    async def reading(self, key: str) -> AsyncIterator[ReadSharers]:
        """For `Request.read_sharers` of a request of the conversation `key`; reading is given up on the way out.

        It may be called from any thread. A future raises `C2CError` where its sharer fails, or so many replicas are
        lost that it is given up.
        """
        loop, tasks, given_up = asyncio.get_running_loop(), list[asyncio.Task[None]](), False

        def read(tokens: Mapping[int, ModelTokens]) -> dict[int, "Future[SharerRows]"]:
            futures: dict[int, Future[SharerRows]] = {number: Future() for number in tokens}

            def begin() -> None:
                if not given_up:
                    tasks.extend(loop.create_task(self._read(n, tokens[n], key, futures[n])) for n in tokens)

            loop.call_soon_threadsafe(begin)
            return futures

        try:
            yield read
        finally:
            given_up = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, number: int, tokens: ModelTokens, key: str, future: "Future[SharerRows]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(await self.prefill(number, tokens, key))
        except asyncio.CancelledError:
            future.set_exception(AbortedError("the request ended before its sharer's rows were needed"))
            raise
        except Exception as error:
            future.set_exception(error)

    async def prefill(self, number: int, tokens: ModelTokens, key: str) -> SharerRows:
        """The rows of sharer `number`; errors as those of `reading`."""
        handle = self._handles[number].options(method_name="prefill", session_id=key)
        lost = LostReplicas(f"reading a prompt by sharer {number}")
        while True:
            response = handle.remote(tokens)
            try:
                rows: SharerRows = await response
                return rows
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                own = own_error(error, handle.deployment_name)
                if not isinstance(own, ReplicaLostError):
                    raise own from error
                await asyncio.sleep(lost.add(own))
