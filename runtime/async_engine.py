"""`AsyncC2CEngine`: a bundle that serves many requests at once, from asyncio or from any thread.

engine = AsyncC2CEngine.from_bundle("demo.bundle")
async for chunk in engine.stream(Request(prompt="Which country is the city of Porto in?")):
    print(chunk.text, end="")
await engine.close()

A thread of its own runs the scheduler; nothing else touches slots and caches.
"""

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self

from c2c_export.bundle import Bundle
from c2c_export.errors import C2CError, UsageError, reason_of
from engines.select import EngineChoice
from runtime.active_request import Listener
from runtime.admission import Place
from runtime.generation import Chunk, Generation
from runtime.pipeline import C2CPipeline
from runtime.request import ClosedError, Request
from runtime.scheduler import Scheduler
from runtime.scheduler_observer import SchedulerObserver
from runtime.scheduler_options import SchedulerOptions

_log = logging.getLogger(__name__)
_WAITING_FOR_OTHERS = 0.05
"""Seconds until deadlines are looked at again while all requests wait for rows that are computed elsewhere."""


class AsyncC2CEngine:
    """A scheduler over a pipeline's slots, in a thread of its own. All methods may be called from any thread."""

    def __init__(
        self,
        pipeline: C2CPipeline,
        options: SchedulerOptions | None = None,
        observer: SchedulerObserver | None = None,
    ) -> None:
        """Takes all slots of `pipeline`, which is not to be used otherwise from now on."""
        self._pipeline = pipeline
        self._scheduler = Scheduler(pipeline, options, observer)
        self._wake = threading.Event()
        self._closing = False
        self._give_up_at: float | None = None
        self._failure: str | None = None
        self._ended = False
        # One, so that planning many prompts leaves the processor to those that are served.
        self._planners = ThreadPoolExecutor(max_workers=1, thread_name_prefix="c2c-planner")
        self._thread = threading.Thread(target=self._serve, name="c2c-scheduler", daemon=True)
        self._thread.start()
        # A process that ends while a graph runs would be aborted, whatever its own status.
        self._at_exit = atexit.register(partial(_close_at_exit, weakref.ref(self)))

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        engine: str = "ort-cpu",
        precision: str | None = None,
        *,
        num_slots: int = 8,
        num_threads: int | None = None,
        allow_unchecked: bool = False,
        allow_failed: bool = False,
        load_sharers: bool = True,
        options: SchedulerOptions | None = None,
        observer: SchedulerObserver | None = None,
    ) -> Self:
        """Open a bundle as `C2CPipeline.from_bundle` does; `num_slots` requests are served at once."""
        pipeline = C2CPipeline.from_bundle(
            path,
            engine,
            precision,
            num_slots=num_slots,
            num_threads=num_threads,
            allow_unchecked=allow_unchecked,
            allow_failed=allow_failed,
            load_sharers=load_sharers,
        )
        return cls(pipeline, options, observer)

    @property
    def bundle(self) -> Bundle:
        """The bundle that is served."""
        return self._pipeline.bundle

    @property
    def engine_choice(self) -> EngineChoice:
        """The engine that runs, and why."""
        return self._pipeline.engine_choice

    @property
    def num_slots(self) -> int:
        """Requests that are served at once."""
        return self._scheduler.num_slots

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._scheduler.num_waiting

    @property
    def num_active(self) -> int:
        """Requests that have a slot."""
        return self._scheduler.num_active

    @property
    def num_requests(self) -> int:
        """Requests that wait or have a slot, counted at one moment."""
        return self._scheduler.num_requests

    @property
    def num_free_slots(self) -> int:
        """Slots that hold neither a request nor a prompt that is still being copied for others."""
        return self._scheduler.num_free_slots

    @property
    def ready(self) -> bool:
        """Whether requests are taken: it is neither closing nor broken."""
        return not (self._closing or self._ended) and self._failure is None

    def tokenize(self, text: str) -> list[int]:
        """The receiver's ids of plain text, without a chat template; special tokens in it count as such."""
        return list(self._pipeline.receiver_tokenizer.encode(text).ids)

    def token_text(self, token_id: int) -> str:
        """What one token of the receiver says by itself."""
        return self._pipeline.tokenizer.decode([token_id], skip_special_tokens=False)

    def submit(self, request: Request, listener: Listener) -> None:
        """Take a request; `listener` gets its chunks, or its error, in the scheduler's thread, and must be quick.

        The prompt is planned in the calling thread. Raises `UsageError` for a request that cannot be served,
        `QueueFullError` where no more may wait, `ClosedError` when the engine is closing, and `AbortedError` when it
        was aborted meanwhile.
        """
        self._submit(request, listener, self._reserve(request))

    def _reserve(self, request: Request, listener: Listener | None = None) -> Place:
        if self._failure is not None:
            raise C2CError(self._failure)
        if self._closing or self._ended:
            raise ClosedError("the engine is closing and takes no more requests")
        place = self._scheduler.reserve(request, listener)
        self._wake.set()  # its deadline may come before it is planned
        return place

    def _submit(self, request: Request, listener: Listener, place: Place) -> None:
        self._scheduler.submit(request, listener, place)
        assert place.active is not None
        for rows in place.active.sharer_rows.values():
            rows.add_done_callback(lambda _: self._wake.set())
        self._wake.set()
        if self._ended:  # between the two
            self._scheduler.end_all(self._ending_error)

    def _ending_error(self) -> C2CError:
        if self._failure is not None:
            return C2CError(self._failure)
        return ClosedError("the engine closed before the request was begun")

    def abort(self, request_id: str) -> bool:
        """End a request with an `AbortedError` and free its slot before anything else is computed.

        Returns whether there was such a request.
        """
        found = self._scheduler.abort(request_id)
        self._wake.set()
        return found

    async def generate(self, request: Request) -> Generation:
        """Serve a request and wait for its answer. Raises what `stream` does; being cancelled aborts the request."""
        async with contextlib.aclosing(self.stream(request)) as chunks:
            async for chunk in chunks:
                if chunk.generation is not None:
                    return chunk.generation
        raise AssertionError("the last chunk has the generation")

    async def stream(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Serve a request, giving its text as it is certain; the last chunk has the whole generation.

        To stop reading (`aclose`, or being cancelled) aborts the request. Raises `UsageError` for a request that
        cannot be served, `QueueFullError`, `ClosedError`, `DeadlineError`, `AbortedError`, and `C2CError` when the
        engine fails.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Chunk | Exception] = asyncio.Queue()

        def listen(event: Chunk | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        place = self._reserve(request, listen)

        def plan() -> None:
            try:
                self._submit(request, listen, place)
            except Exception as error:
                listen(error)
            except BaseException as error:  # a panic of a library's Rust code
                listen(C2CError(f"the prompt cannot be planned: {reason_of(error)}"))

        try:
            self._planners.submit(plan)
        except RuntimeError as error:  # it was shut down since
            self._give_up(place)
            raise ClosedError("the engine closed before the request was begun") from error
        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = isinstance(event, Exception) or event.generation is not None
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            if not ended:
                self._give_up(place)

    def _give_up(self, place: Place) -> None:
        self._scheduler.give_up(place)
        self._wake.set()

    async def close(self, drain_seconds: float | None = None) -> None:
        """Take no more requests, finish those that wait and run, and end the thread.

        After `drain_seconds`, if given, those that are left end with a `ClosedError`. Closing again waits too. Raises
        `UsageError` where `drain_seconds` is no number of seconds, and goes on serving.
        """
        self._begin_closing(drain_seconds)
        await asyncio.to_thread(self._join)

    def close_and_wait(self, drain_seconds: float | None = None) -> None:
        """As `close`, for callers without an event loop; not to be called by a listener."""
        self._begin_closing(drain_seconds)
        self._join()

    def _join(self) -> None:
        self._thread.join()
        atexit.unregister(self._at_exit)
        self._planners.shutdown(wait=True)  # what waits to be planned ends at once, as its place is gone

    def _begin_closing(self, drain_seconds: float | None) -> None:
        if drain_seconds is not None:
            if isinstance(drain_seconds, bool) or not isinstance(drain_seconds, int | float) or not drain_seconds >= 0:
                raise UsageError(f"drain_seconds: {drain_seconds!r} is not allowed; expected a number, 0 or more")
            self._give_up_at = time.perf_counter() + drain_seconds
        self._closing = True
        self._wake.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _serve(self) -> None:
        """Run the scheduler until the engine is closed and nothing is left to do."""
        try:
            while True:
                self._wake.clear()  # before it is looked at what there is to do, so that no waking is lost
                if self._closing and not self._scheduler.has_requests:
                    break
                if self._give_up_at is not None and time.perf_counter() >= self._give_up_at:
                    self._scheduler.end_all(lambda: ClosedError("the engine closed before the request was done"))
                elif not self._scheduler.step():
                    self._wake.wait(_WAITING_FOR_OTHERS if self._scheduler.has_requests else None)
        except BaseException as error:  # a panic of a library's Rust code is no Exception
            _log.exception("the scheduler failed")
            self._failure = f"the engine failed: {type(error).__name__}: {reason_of(error)}"
        finally:
            self._ended = True
            self._scheduler.end_all(self._ending_error)


def _close_at_exit(reference: "weakref.ref[AsyncC2CEngine]") -> None:
    engine = reference()
    if engine is not None:
        engine.close_and_wait(drain_seconds=0.0)
