"""In-flight batching: many requests over one pool of slots, each answered as if it were alone.

Each time round, requests that ended are taken out and waiting ones get their slots; then a piece of a prompt is
prefilled or fused, no longer than what decoding may stall; then one decode step runs over all slots that generate, in
one call of the receiver. A request's answer does not depend on the others: engines compute each request of a step by
itself, and a prompt's rows do not depend on where it is cut into pieces (`runtime.prefill_work`).

One thread calls `step`; any thread may `submit` and `abort`. Not covered: that thread, and asyncio
(`runtime.async_engine`).
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from c2c_export.errors import C2CError, reason_of
from runtime.active_request import ActiveRequest, Listener
from runtime.admission import Admission, Place
from runtime.decode_step import decode_step
from runtime.generation import Chunk
from runtime.pipeline import C2CPipeline
from runtime.prefill import Prefill
from runtime.prefill_work import Piece
from runtime.prefix_cache import PrefixCache
from runtime.request import AbortedError, DeadlineError, QueueFullError, Request
from runtime.request_planner import RequestPlanner
from runtime.row_keeper import RowKeeper
from runtime.row_keeping import RowKeeping
from runtime.scheduler_observer import SchedulerObserver
from runtime.scheduler_options import SchedulerOptions
from runtime.stall_budget import StallBudget

_log = logging.getLogger(__name__)
_UNSTALLED_ROWS = 512
_UNSTALLED_TIMES = 4
"""A piece when nobody is decoding is so many times what decoding may stall for, and has so many rows at most."""


class Scheduler:
    """Serves requests over a pipeline's slots, all of which it takes."""

    def __init__(
        self, pipeline: C2CPipeline, options: SchedulerOptions | None = None, observer: SchedulerObserver | None = None
    ) -> None:
        """Raises `C2CError` when sessions of the pipeline are open."""
        options = options or SchedulerOptions()
        self._observer = observer or SchedulerObserver()
        self._pipeline = pipeline
        self.planner = RequestPlanner(pipeline)
        self.prefix_cache = PrefixCache(pipeline.prefiller, options.prefix_cache_bytes)
        self.num_slots = len(pipeline.take_all_slots())
        self._admission = Admission(self.num_slots, options.max_waiting, options.aging_seconds)
        build = pipeline.engine_choice.record.build
        sizes = None if build is None else build.profile_sizes
        self._max_batch = None if sizes is None else sizes.max_batch
        self._budget = StallBudget(options.max_stall)
        self._keeping = RowKeeping(self.prefix_cache)
        self._prefilling: list[ActiveRequest] = []
        self._decoding: list[ActiveRequest] = []

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, those that are being planned included."""
        return self._admission.num_waiting

    @property
    def num_active(self) -> int:
        """Requests with a slot."""
        return self._admission.num_served

    @property
    def num_requests(self) -> int:
        """Requests that wait or have a slot, counted at one moment."""
        return self._admission.num_requests

    @property
    def num_free_slots(self) -> int:
        """Slots that hold neither a request nor a prompt that is being copied."""
        return len(self._admission.free_slots)

    @property
    def has_requests(self) -> bool:
        """Whether any request waits or is served."""
        return bool(self._admission.num_requests)

    def reserve(self, request: Request, listener: Listener | None = None) -> Place:
        """A place in the queue, at once. Raises what `Admission.reserve` raises.

        `listener` hears the error of a request that ends before it is planned; whoever plans it may get it later too.
        """
        try:
            return self._admission.reserve(request, listener)
        except QueueFullError:
            self._observe(self._observer.refused)
            raise

    def give_up(self, place: Place) -> None:
        """Abort the request of a place, whether it is planned yet or not; nothing where it has ended."""
        if self._admission.drop(place):
            self._observe(self._observer.failed, place.lost())
        elif place.active is not None:
            place.active.aborted = True

    def submit(self, request: Request, listener: Listener, place: Place | None = None) -> None:
        """Plan a request in this thread and let it wait for a slot. `listener` is called by the thread of `step`.

        `place` is what `reserve` gave, else it is asked for here. Raises what `reserve` raises, `UsageError` for a
        request that cannot be served, and `AbortedError`, `DeadlineError` or `ClosedError` where it ended meanwhile.
        """
        place = place or self.reserve(request)
        try:
            if not self._admission.holds(place):
                raise place.lost()
            active = self.planner.take(request, listener, place.since)
            num_waiting = self._admission.enqueue(place, active)
        except BaseException:
            self._admission.drop(place)
            raise
        self._observe(self._observer.queued, num_waiting)

    def abort(self, request_id: str) -> bool:
        """End a request with an `AbortedError` before anything else is computed; whether there was one."""
        place = self._admission.drop_id(request_id)
        if place is not None:
            self._lose(place, place.lost())
            return True
        active = self._admission.find(request_id)
        if active is None:
            return False
        active.aborted = True
        return True

    def end_all(self, make_error: Callable[[], C2CError]) -> None:
        """End every request, each with an error of its own.

        Called by the thread of `step`, or when it steps no more.
        """
        for place in self._admission.drop_all():
            self._lose(place, make_error())
        for active in self._admission.every():
            self._fail(active, make_error())

    def step(self) -> bool:
        """Go once round. Returns whether anything was done: if not, all wait for rows that are computed elsewhere."""
        ended = self._end_unwanted()
        admitted = self._admit()
        prefilled = self._prefill_some()
        decoded = self._decode()
        if ended or admitted or prefilled or decoded:
            num_bytes, num_queued = self.prefix_cache.num_bytes, self._admission.num_queued
            self._observe(self._observer.stepped, len(self._decoding), len(self._prefilling), num_queued, num_bytes)
            return True
        return False

    def _lose(self, place: Place, error: C2CError) -> None:
        """End the request of a place that was let go of."""
        place.error = error
        self._observe(self._observer.failed, error)
        if place.listener is not None:
            place.listener(error)

    def _end_unwanted(self) -> bool:
        overdue = self._admission.drop_overdue()
        for place in overdue:
            self._lose(place, _overdue(place.request))
        ended = bool(overdue)
        for active in self._admission.every():
            if active.aborted:
                self._fail(active, AbortedError("the request was aborted"))
            elif active.overdue:
                self._fail(active, _overdue(active.request))
            else:
                continue
            ended = True
        return ended

    def _admit(self) -> bool:
        admitted = False
        while (taken := self._admission.take()) is not None:
            active, num_waiting = taken
            admitted, active.started = True, time.perf_counter()
            self._prefilling.append(active)
            self._observe(self._observer.started, active.started - active.submitted, num_waiting)
        return admitted

    def _next_to_prefill(self) -> ActiveRequest | None:
        """The first request, in the order in which they got their slots, that does not wait for rows from elsewhere.

        It is begun only now, as the one before it may have left rows to go on from.
        """
        for active in list(self._prefilling):
            try:
                prefill = active.prefill or self._begin(active)
            except Exception as error:
                self._fail(active, _own(error, "the prompt"))
                continue
            if not prefill.waiting:
                return active
        return None

    def _begin(self, active: ActiveRequest) -> Prefill:
        prefiller = self._pipeline.prefiller
        target = prefiller.target(active.plan)
        kept, reuse = self.prefix_cache.find(target)
        active.num_reused_tokens = reuse.num_rows
        keep_rows = self._keeping.set_aside(active.slot, target, reuse)
        active.prefill = Prefill(
            prefiller,
            active.slot,
            active.plan,
            reuse,
            begun_with=kept,
            keep_rows=keep_rows,
            sharer_rows=active.sharer_rows,
        )
        return active.prefill

    def _prefill_some(self) -> bool:
        """Copy rows to keep and run pieces of prompts, one prompt after the other, as long as decoding may stall."""
        started, ran = time.perf_counter(), False
        while self._keeping or self._prefilling:
            spent = time.perf_counter() - started
            if ran and (self._budget.used_up(spent) or not self._decoding):
                return True
            if self._keeping:
                self._keep_some(spent)
                ran = True
                continue
            active = self._next_to_prefill()
            if active is None:
                return ran
            self._run_piece(active, spent)
            ran = True
        return ran

    def _run_piece(self, active: ActiveRequest, spent: float) -> None:
        """Run what fits into the rest of the budget."""
        prefill = _prefill_of(active)
        kind = _kind_of(prefill.next_piece)
        max_rows = self._budget.rows(kind, spent)
        if not self._decoding:  # nobody stalls, but aborts and newcomers wait for it
            max_rows = min(_UNSTALLED_ROWS, _UNSTALLED_TIMES * max_rows)
        before, started = prefill.num_rows_left, time.perf_counter()
        try:
            piece = prefill.advance(max_rows)
            if prefill.gives_logits(piece):
                active.logits = self._pipeline.receiver.logits()
            rows = before - prefill.num_rows_left
            if rows:
                # On a GPU a piece is only queued so far; where nobody stalls, the devices need not be waited for.
                seconds = prefill.seconds_of_last_piece() if self._decoding else time.perf_counter() - started
                self._budget.measured(kind, rows, seconds)
            if prefill.done:
                self._finish_prefill(active)
        except Exception as error:
            self._fail(active, _own(error, "the prompt"))

    def _finish_prefill(self, active: ActiveRequest) -> None:
        """Choose the first token; the prompt's rows are kept for others meanwhile."""
        prefill = _prefill_of(active)
        active.prefill_timings = prefill.timings()
        active.state = self._pipeline.prefiller.target(active.plan)
        active.next_position = active.plan.num_positions
        self._keeping.begin(active.slot, prefill)
        self._prefilling.remove(active)
        self._decoding.append(active)
        active.prefill = None
        self._observe(self._observer.prefilled, active.state.num_rows, active.num_reused_tokens)
        logits, active.logits = active.logits, None
        assert logits is not None
        if self._take_token(active, logits):
            self._observe(self._observer.first_token, active.first_token_at - active.submitted)

    def _keep_some(self, spent: float) -> None:
        """Copy some rows of a prompt; all that are left where nobody decodes."""
        started = time.perf_counter()
        max_rows = self._budget.rows(RowKeeper, spent) if self._decoding else self._keeping.num_rows_left
        copied = self._keeping.advance(max(1, max_rows))
        if copied:
            self._budget.measured(RowKeeper, copied, time.perf_counter() - started)
        for slot in self._keeping.take_free():
            self._admission.free(slot)

    def _decode(self) -> bool:
        """One step of every request that generates."""
        if not self._decoding:
            return False
        spare = dict.fromkeys(self._admission.free_slots, 0) | self._keeping.left_slots
        spare |= {active.slot: active.prefill.num_rows if active.prefill else 0 for active in self._prefilling}
        for active, logits in decode_step(self._pipeline.receiver, self._decoding, spare, self._max_batch):
            if isinstance(logits, Exception):
                self._fail(active, _own(logits, "a decode step"))
                continue
            active.state.append(active.reply.token_ids[-1], active.next_position)
            active.next_position += 1
            before = active.last_token_at
            if self._take_token(active, logits):
                self._observe(self._observer.next_token, active.last_token_at - before)
        return True

    def _take_token(self, active: ActiveRequest, logits: NDArray[np.float32]) -> bool:
        """Choose a token and tell it; whether that went well."""
        try:
            chunk = active.take_token(logits)
            last = None if active.reply.ended_by is None else active.last_chunk()
        except Exception as error:
            if not np.isfinite(logits).all():
                self._cleared(partial(self._pipeline.prefiller.clear, active.slot, active.state))
            self._fail(active, _own(error, "choosing a token"))
            return False
        self._tell(active, chunk)
        if last is not None:
            self._end(active, answered=True)
            self._admission.served(time.perf_counter() - active.started)
            assert last.generation is not None
            # Who has the answer finds it counted.
            self._observe(self._observer.finished, last.generation)
            self._tell(active, last)
        return True

    def _fail(self, active: ActiveRequest, error: Exception) -> None:
        if self._end(active, answered=False):
            self._observe(self._observer.failed, error)
            self._tell(active, error)

    def _tell(self, active: ActiveRequest, event: Chunk | Exception) -> None:
        try:
            active.listener(event)
        except Exception:  # a listener's fault is its own request's, and no other's
            _log.exception("the listener of request %s failed", active.request.request_id)
            active.aborted = True
            active.listener = _ignore

    def _observe(self, told: Callable[..., None], *values: Any) -> None:
        try:
            told(*values)
        except Exception:  # no answer depends on what is counted
            _log.exception("the observer failed")

    def _cleared(self, clear: Callable[[], None]) -> None:
        """Leave no NaN in a slot: some engines add masked rows, times zero."""
        try:
            clear()
        except Exception:  # the request ends all the same
            _log.exception("a slot could not be cleared")

    def _end(self, active: ActiveRequest, *, answered: bool) -> bool:
        """Take a request out of wherever it is; whether it was anywhere.

        Its slot is free at once, but for that of an answered one whose prompt is still being copied.
        """
        if not self._admission.end(active):
            return False
        for stage in (self._prefilling, self._decoding):
            if active in stage:
                stage.remove(active)
        slot, active.slot = active.slot, -1
        if slot < 0:
            return True
        if active.prefill is not None:  # nobody has seen whether its rows are finite
            self._cleared(active.prefill.clear)
            active.prefill = None
        if not answered:
            self._keeping.drop(slot)
        if self._keeping.leave(slot, len(active.plan.receiver.ids)):
            self._admission.free(slot)
        return True


def _ignore(event: Chunk | Exception) -> None:
    """In place of a listener that failed."""


def _overdue(request: Request) -> DeadlineError:
    return DeadlineError(f"the request was not done within {request.deadline:g} s")


def _own(error: Exception, what: str) -> C2CError:
    return error if isinstance(error, C2CError) else C2CError(f"{what} failed: {reason_of(error)}")


def _prefill_of(active: ActiveRequest) -> Prefill:
    assert active.prefill is not None
    return active.prefill


def _kind_of(piece: Piece) -> tuple[type[Piece], int]:
    return type(piece), getattr(piece, "number", 0)
