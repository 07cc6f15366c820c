"""In-flight batching: many requests over one pool of slots, each answered as if it were alone.

Each time round, requests that ended are taken out and waiting ones get their slots; then a piece of a prompt is
prefilled or fused, no longer than what decoding may stall; then one decode step runs over all slots that generate, in
one call of the receiver. A request's answer does not depend on the others: engines compute each request of a step by
itself, and a prompt's rows do not depend on where it is cut into pieces (`runtime.prefill_work`).

One thread calls `step`; any thread may `submit` and `abort`. Not covered: that thread, and asyncio
(`runtime.async_engine`).
"""

import heapq
import logging
import threading
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from c2c_export.errors import C2CError, UsageError, reason_of
from runtime.active_request import ActiveRequest, Listener
from runtime.conversation import Conversation
from runtime.decode_ranges import StepSlot, decode_ranges
from runtime.generation import Chunk
from runtime.pipeline import C2CPipeline
from runtime.prefill import Prefill
from runtime.prefill_work import Piece, PrefillSharer
from runtime.prefix_cache import PrefixCache
from runtime.prompt import Plan
from runtime.reply import Reply, generation_limit
from runtime.request import AbortedError, DeadlineError, QueueFullError, Request
from runtime.request_queue import RequestQueue
from runtime.row_keeper import RowKeeper
from runtime.sampling import Sampler
from runtime.scheduler_observer import SchedulerObserver
from runtime.stall_budget import StallBudget

_log = logging.getLogger(__name__)
_UNSTALLED_ROWS = 512
_UNSTALLED_TIMES = 4
"""A piece when nobody is decoding is so many times what decoding may stall for, and has so many rows at most."""


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """Raises `UsageError`, naming the field, for a value out of range."""

    max_waiting: int = 64
    """Requests that may wait for a slot."""
    max_stall: float = 0.2
    """Seconds of prefilling between two decode steps, if the machine computes two rows in that time."""
    aging_seconds: float = 10.0
    """Seconds of waiting that count as much as one level of priority."""
    prefix_cache_bytes: int = 512 * 2**20
    """Memory for rows of former prompts; 0 keeps none."""

    def __post_init__(self) -> None:
        if isinstance(self.max_waiting, bool) or not isinstance(self.max_waiting, int) or self.max_waiting < 0:
            raise UsageError(f"max_waiting: {self.max_waiting!r} is not allowed; expected an integer, 0 or more")
        for name in ("max_stall", "aging_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise UsageError(f"{name}: {value!r} is not allowed; expected a number of seconds above 0")


@dataclass(frozen=True)
class Place:
    """A place in the queue for a request that is not planned yet."""

    request: Request
    since: float
    """When it was asked for, by `time.perf_counter`."""


class Scheduler:
    """Serves requests over a pipeline's slots, all of which it takes."""

    def __init__(
        self, pipeline: C2CPipeline, options: SchedulerOptions | None = None, observer: SchedulerObserver | None = None
    ) -> None:
        """Raises `C2CError` when sessions of the pipeline are open."""
        self._options = options or SchedulerOptions()
        self._observer = observer or SchedulerObserver()
        self._pipeline = pipeline
        self.prefix_cache = PrefixCache(pipeline.prefiller, self._options.prefix_cache_bytes)
        self._free_slots = list(pipeline.take_all_slots())
        self.num_slots = len(self._free_slots)
        build = pipeline.engine_choice.record.build
        sizes = None if build is None else build.profile_sizes
        self._max_batch = None if sizes is None else sizes.max_batch
        self._budget = StallBudget(self._options.max_stall)
        self._prefilling: list[ActiveRequest] = []
        self._decoding: list[ActiveRequest] = []
        self._keepers: dict[int, RowKeeper] = {}
        """By slot: what copies a prompt out of it for others."""
        self._lock = threading.Lock()  # of the free slots and of the three below
        self._queue = RequestQueue(self._options.aging_seconds)
        self._reserved: set[str] = set()
        self._live: dict[str, ActiveRequest] = {}
        self._seconds_per_request = 1.0

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, those that are being planned included."""
        return len(self._queue) + len(self._reserved)

    @property
    def num_active(self) -> int:
        """Requests with a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_free_slots(self) -> int:
        """Slots without a request."""
        return len(self._free_slots)

    @property
    def has_requests(self) -> bool:
        """Whether any request waits or is served."""
        return bool(self._live or self._reserved)

    def plan(self, request: Request) -> Plan:
        """What a request's prompt is to every model. Raises `UsageError`."""
        conversation = Conversation.of(request.prompt)
        sharers = self._pipeline.select_sharers(request.fuse, request.sharers)
        return self._pipeline.make_plan(conversation.messages, conversation.ids, sharers)

    def reserve(self, request: Request) -> "Place":
        """A place in the queue, at once; the request's time runs from now on.

        Raises `QueueFullError` where no more may wait (as many as there are free slots hardly do, and do not count),
        and `UsageError` where another request has its id.
        """
        with self._lock:
            if request.request_id in self._live or request.request_id in self._reserved:
                raise UsageError(f"request_id: {request.request_id!r} is in use by another request")
            num_waiting = len(self._queue) + len(self._reserved)
            if num_waiting >= self._options.max_waiting + len(self._free_slots):
                retry_after = max(1.0, self._seconds_per_request * num_waiting)
                self._observer.refused()
                raise QueueFullError(
                    f"{num_waiting} requests wait already, as many as may; try again in some seconds", retry_after
                )
            self._reserved.add(request.request_id)
        return Place(request, time.perf_counter())

    def give_up(self, place: "Place") -> None:
        """Free a place whose request is not to be submitted after all; nothing where it was."""
        with self._lock:
            self._reserved.discard(place.request.request_id)

    def submit(self, request: Request, listener: Listener, place: "Place | None" = None) -> None:
        """Plan a request in this thread and let it wait for a slot. `listener` is called by the thread of `step`.

        `place` is what `reserve` gave, else it is asked for here. Raises what `reserve` raises, and `UsageError` for a
        request that cannot be served.
        """
        place = place or self.reserve(request)
        try:
            active = self._planned(request, listener, place.since)
        except BaseException:
            self.give_up(place)
            raise
        with self._lock:
            self._reserved.discard(request.request_id)
            self._queue.put(active)
            self._live[request.request_id] = active
            num_waiting = len(self._queue)
        self._observer.queued(num_waiting)

    def _planned(self, request: Request, listener: Listener, since: float) -> ActiveRequest:
        began = time.perf_counter()
        plan = self.plan(request)
        num_rows, capacity = len(plan.receiver.ids), self._pipeline.bundle.manifest.max_length
        wanted, room = request.max_new_tokens, capacity - num_rows + 1
        if request.shorten and wanted is not None and wanted > room:
            wanted = None
        limit = generation_limit(wanted, num_rows, room, capacity)
        stop_ids = () if request.ignore_eos else self._pipeline.bundle.manifest.stop_ids
        reply = Reply(self._pipeline.tokenizer, limit=limit, stop_ids=stop_ids, stop=request.stop)
        active = ActiveRequest(request, plan, reply, Sampler(request.sampling), listener, submitted=since)
        active.planning_seconds = time.perf_counter() - began
        return active

    def abort(self, request_id: str) -> bool:
        """End a request with an `AbortedError` before anything else is computed; whether there was one."""
        with self._lock:
            active = self._live.get(request_id)
            if active is None:
                return False
            active.aborted = True
            return True

    def end_all(self, error: C2CError) -> None:
        """End every request with `error`; called by the thread of `step`, or when it steps no more."""
        with self._lock:
            every = list(self._live.values())
        for active in every:
            self._fail(active, error)

    def step(self) -> bool:
        """Go once round. Returns whether anything was done: if not, all wait for rows that are computed elsewhere."""
        ended = self._end_unwanted()
        admitted = self._admit()
        prefilled = self._prefill_some()
        decoded = self._decode()
        if ended or admitted or prefilled or decoded:
            self._observer.stepped(
                len(self._decoding), len(self._prefilling), len(self._queue), self.prefix_cache.num_bytes
            )
            return True
        return False

    def _end_unwanted(self) -> bool:
        with self._lock:
            every = list(self._live.values())
        ended = False
        for active in every:
            if active.aborted:
                self._fail(active, AbortedError("the request was aborted"))
            elif active.overdue:
                self._fail(active, DeadlineError(f"the request was not done within {active.request.deadline:g} s"))
            else:
                continue
            ended = True
        return ended

    def _admit(self) -> bool:
        admitted = False
        while self._free_slots:
            with self._lock:
                active, num_waiting = self._queue.take(), len(self._queue)
                if active is None:
                    break
                # The lowest free slot, so that the slots of a decode step lie together.
                active.slot = heapq.heappop(self._free_slots)
            admitted, active.started = True, time.perf_counter()
            self._prefilling.append(active)
            self._observer.started(active.started - active.submitted, num_waiting)
        return admitted

    def _next_to_prefill(self) -> ActiveRequest | None:
        """The first request, in the order in which they got their slots, that does not wait for rows from elsewhere.

        It is begun only now, as the one before it may have left rows to go on from.
        """
        for active in list(self._prefilling):
            try:
                prefill = active.prefill or self._begin(active)
            except Exception as error:
                self._fail(active, _own(error))
                continue
            if not prefill.waiting:
                return active
        return None

    def _begin(self, active: ActiveRequest) -> Prefill:
        prefiller = self._pipeline.prefiller
        target = prefiller.target(active.plan)
        kept, reuse = self.prefix_cache.find(target)
        active.num_reused_tokens = reuse.num_rows
        worth_keeping = reuse.num_rows < target.num_rows - 1 and self.prefix_cache.worth_keeping(target)
        active.prefill = Prefill(
            prefiller,
            active.slot,
            active.plan,
            reuse,
            begun_with=kept,
            keep_rows=worth_keeping,
            sharer_rows=active.request.sharer_rows,
        )
        return active.prefill

    def _prefill_some(self) -> bool:
        """Keep rows and run pieces of prompts, one prompt after the other, as long as decoding may stall."""
        started, ran = time.perf_counter(), False
        while self._keepers or self._prefilling:
            spent = time.perf_counter() - started
            if ran and (self._budget.used_up(spent) or not self._decoding):
                return True
            if self._keepers:
                self._keep_some(next(iter(self._keepers)), spent)
                ran = True
                continue
            active = self._next_to_prefill()
            if active is None:
                return ran
            if not self._run_piece(active, spent, ran):
                return True
            ran = True
        return ran

    def _run_piece(self, active: ActiveRequest, spent: float, ran: bool) -> bool:
        """Run what fits into the rest of the budget; False where it does not, and something `ran` before."""
        prefill = _prefill_of(active)
        kind = _kind_of(prefill.next_piece)
        max_rows = self._budget.rows(kind, spent)
        if not self._decoding:  # nobody stalls, but aborts and newcomers wait for it
            max_rows = min(_UNSTALLED_ROWS, _UNSTALLED_TIMES * max_rows)
        elif ran and not max_rows:
            return False
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
            self._fail(active, _own(error))
        return True

    def _finish_prefill(self, active: ActiveRequest) -> None:
        """Choose the first token; the prompt's rows are kept for others meanwhile."""
        prefill = _prefill_of(active)
        active.prefill_timings = prefill.timings()
        active.state = self._pipeline.prefiller.target(active.plan)
        active.next_position = active.plan.num_positions
        keeper = prefill.row_keeper()
        if keeper is not None:
            self._keepers[active.slot] = keeper
        self._prefilling.remove(active)
        self._decoding.append(active)
        active.prefill = None
        self._observer.prefilled(active.state.num_rows, active.num_reused_tokens)
        logits, active.logits = active.logits, None
        assert logits is not None
        if self._take_token(active, logits):
            self._observer.first_token(active.first_token_at - active.submitted)

    def _keep_some(self, slot: int, spent: float) -> None:
        """Copy some rows of a slot; all that is left where nobody decodes."""
        keeper, started = self._keepers[slot], time.perf_counter()
        max_rows = self._budget.rows(RowKeeper, spent) if self._decoding else keeper.num_rows_left
        before = keeper.num_rows_left
        going_on = self._keep(keeper, max_rows)
        self._budget.measured(RowKeeper, before - keeper.num_rows_left, time.perf_counter() - started)
        if not going_on:
            del self._keepers[slot]

    def _keep(self, keeper: RowKeeper, max_rows: int) -> bool:
        """Copy about so many rows, and keep them all where that was the last; whether more are to be copied."""
        try:
            left = max_rows
            while left > 0 and not keeper.done:
                left -= keeper.advance(left)
            if keeper.done:
                self.prefix_cache.add(keeper.kept_rows())
        except Exception:  # such as no memory: nobody's answer depends on it
            _log.exception("rows of a prompt could not be kept")
            return False
        return not keeper.done

    def _decode(self) -> bool:
        """One step of every request that generates."""
        if not self._decoding:
            return False
        by_slot = {active.slot: active for active in self._decoding}
        wanted = {
            slot: StepSlot(active.reply.token_ids[-1], active.next_position, active.state.num_rows)
            for slot, active in by_slot.items()
        }
        # What lies between them is computed too: into rows that nothing has been written to yet.
        spare = dict.fromkeys(self._free_slots, 0)
        spare |= {active.slot: active.prefill.num_rows if active.prefill else 0 for active in self._prefilling}
        receiver = self._pipeline.receiver
        for slots, step in decode_ranges(wanted, spare, receiver.capacity, self._max_batch):
            served = [by_slot[slot] for slot in slots if slot in by_slot]
            try:
                receiver.run_step(
                    [token.token_id for token in step],
                    [token.position_id for token in step],
                    [token.row for token in step],
                    slots.start,
                )
                logits = receiver.step_logits(len(slots))
            except C2CError as error:
                for active in served:
                    self._fail(active, error)
                continue
            for active in served:
                active.state.append(active.reply.token_ids[-1], active.next_position)
                active.next_position += 1
                before = active.last_token_at
                if self._take_token(active, logits[active.slot - slots.start]):
                    self._observer.next_token(active.last_token_at - before)
        return True

    def _take_token(self, active: ActiveRequest, logits: NDArray[np.float32]) -> bool:
        """Choose a token and tell it; whether that went well."""
        try:
            chunk = active.take_token(logits)
        except C2CError as error:
            if not np.isfinite(logits).all():
                self._clear_slot(active)
            self._fail(active, error)
            return False
        self._tell(active, chunk)
        if active.reply.ended_by is not None:
            last = active.last_chunk()
            self._release(active)
            seconds = time.perf_counter() - active.started
            self._seconds_per_request += 0.1 * (seconds / self.num_slots - self._seconds_per_request)
            assert last.generation is not None
            # Who has the answer finds it counted.
            self._observer.finished(last.generation)
            self._tell(active, last)
        return True

    def _fail(self, active: ActiveRequest, error: Exception) -> None:
        if self._release(active):
            self._observer.failed(error)
            self._tell(active, error)

    def _tell(self, active: ActiveRequest, event: Chunk | Exception) -> None:
        try:
            active.listener(event)
        except Exception:  # a listener's fault is its own request's, and no other's
            _log.exception("the listener of request %s failed", active.request.request_id)
            active.aborted = True

    def _clear_slot(self, active: ActiveRequest) -> None:
        """Leave no NaN in a slot: some engines add masked rows, times zero."""
        receiver = self._pipeline.receiver
        receiver.clear_rows(active.slot, min(active.state.num_rows + 1, receiver.capacity))
        for number, tokens in active.state.sharers.items():
            self._pipeline.prefiller.sharers[number].clear_rows(active.slot, len(tokens.ids))

    def _release(self, active: ActiveRequest) -> bool:
        """Take a request out of wherever it is; its slot is free at once. Returns whether it was anywhere."""
        with self._lock:
            if self._live.pop(active.request.request_id, None) is None:
                return False
            self._queue.remove(active)
        keeper = self._keepers.pop(active.slot, None)
        if keeper is not None and active.reply.ended_by is not None:
            self._keep(keeper, keeper.num_rows_left)
        if active.slot >= 0:
            with self._lock:
                heapq.heappush(self._free_slots, active.slot)
            active.slot = -1
        for stage in (self._prefilling, self._decoding):
            if active in stage:
                stage.remove(active)
        active.prefill = None
        return True


def _own(error: Exception) -> C2CError:
    return error if isinstance(error, C2CError) else C2CError(f"the prompt failed: {reason_of(error)}")


def _prefill_of(active: ActiveRequest) -> Prefill:
    assert active.prefill is not None
    return active.prefill


def _kind_of(piece: Piece) -> tuple[type[Piece], int]:
    return type(piece), piece.number if isinstance(piece, PrefillSharer) else 0
