"""Prometheus metrics of one process, in a registry of their own.

In: what the scheduler tells as it happens, and the requests that were answered. Out: `registry`. Times are in seconds.
docs/serving.md lists them all.
"""

from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from runtime.generation import Generation
from runtime.request import AbortedError, ClosedError, DeadlineError
from runtime.scheduler_observer import SchedulerObserver
from runtime.server.served_engine import ServedEngine

_PREFILL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OUTCOMES: dict[type[Exception], str] = {AbortedError: "aborted", DeadlineError: "deadline", ClosedError: "closed"}


class MetricMaker(Protocol):
    """Makes metrics that have the methods of prometheus-client's."""

    def counter(self, name: str, what: str, *labels: str) -> Counter:
        """With `labels` and `inc`."""

    def gauge(self, name: str, what: str, *labels: str) -> Gauge:
        """With `labels` and `set`."""

    def seconds(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        """With `labels` and `observe`."""


@dataclass(frozen=True)
class _PrometheusMaker:
    registry: CollectorRegistry

    def counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, registry=self.registry)

    def gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(name, what, labels, registry=self.registry)

    def seconds(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{name}_seconds", what, labels, buckets=buckets, registry=self.registry)


class HttpMetrics:
    """The metrics of an application whose engines are elsewhere: HTTP requests, and the process."""

    def __init__(self, maker: MetricMaker | None = None) -> None:
        """`maker` makes them; None makes those of prometheus-client, in `registry`."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._maker = maker or _PrometheusMaker(self.registry)
        counter, seconds = self._maker.counter, self._maker.seconds
        self._http = counter("c2c_http_requests", "HTTP requests by route and status", "path", "status")
        self._http_time = seconds("c2c_http_request", "HTTP requests from first to last byte", _REQUEST_BUCKETS, "path")

    def answered(self, path: str, status: int, seconds: float) -> None:
        """An HTTP request was answered; `path` is its route's."""
        self._http.labels(path, str(status)).inc()
        self._http_time.labels(path).observe(seconds)

    def refused(self) -> None:
        """A generation was refused, as there was no room for it. Counted where the engine's are."""

    def read_engine(self, engine: ServedEngine) -> None:
        """Look at what the engine holds at this moment; nothing here."""


class ServerMetrics(HttpMetrics, SchedulerObserver):
    """All metrics; give it to the engine as its observer, and to `create_app`."""

    def __init__(self, maker: MetricMaker | None = None) -> None:
        """As `HttpMetrics`."""
        super().__init__(maker)
        counter, gauge, seconds = self._maker.counter, self._maker.gauge, self._maker.seconds

        self._queue = gauge("c2c_queue_length", "Requests that wait for a slot")
        self._slots = gauge("c2c_slots", "Slots of the engine by state", "state")
        self._cached = gauge("c2c_cached_bytes", "Bytes of cache rows that are kept for later prompts")
        self._requests = counter("c2c_requests", "Generations by outcome", "outcome")
        self._refused = counter("c2c_refused", "Generations that were refused, as the queue was full")
        self._prompt = counter("c2c_prompt_tokens", "Receiver tokens of prompts that were prefilled")
        self._reused = counter("c2c_reused_tokens", "Those of them whose rows were there already")
        self._generated = counter("c2c_generated_tokens", "Tokens of finished generations")
        self._waited = seconds("c2c_queued", "From submission to a slot", _PREFILL_BUCKETS)
        self._first = seconds("c2c_time_to_first_token", "From submission to the first token", _PREFILL_BUCKETS)
        self._next = seconds("c2c_inter_token", "From one token to the next", _TOKEN_BUCKETS)
        self._sharer = seconds("c2c_sharer_prefill", "A prompt's prefill in the sharers", _PREFILL_BUCKETS)
        self._receiver = seconds("c2c_receiver_prefill", "A prompt's prefill in the receiver", _PREFILL_BUCKETS)
        self._fuse = seconds("c2c_fuse", "A prompt's fusing", _PREFILL_BUCKETS)
        # So that rates are right from the first request on.
        for outcome in ("stop", "length", "failed", *_OUTCOMES.values()):
            self._requests.labels(outcome)
        for state in ("decoding", "prefilling", "copying", "free"):
            self._slots.labels(state)
        self._num_decoding = 0

    def queued(self, num_waiting: int) -> None:
        """As `SchedulerObserver.queued`, and so are the others."""
        self._queue.set(num_waiting)

    def refused(self) -> None:
        """Count it."""
        self._refused.inc()

    def started(self, waited: float, num_waiting: int) -> None:
        """Time in the queue."""
        self._waited.observe(waited)
        self._queue.set(num_waiting)

    def prefilled(self, prompt_tokens: int, reused_tokens: int) -> None:
        """Tokens of prompts."""
        self._prompt.inc(prompt_tokens)
        self._reused.inc(reused_tokens)

    def first_token(self, seconds: float) -> None:
        """Time to first token."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Inter-token latency."""
        self._next.observe(seconds)

    def finished(self, generation: Generation) -> None:
        """Outcome, tokens, and the phases of the prefill."""
        self._requests.labels(generation.finish_reason).inc()
        self._generated.inc(len(generation.token_ids))
        timings = generation.timings
        self._receiver.observe(timings.receiver_prefill)
        # The receiver alone, and a prompt that was all reused, have no such phase.
        for histogram, spent in ((self._sharer, timings.sharer_prefill), (self._fuse, timings.fuse)):
            if spent:
                histogram.observe(spent)

    def failed(self, error: Exception) -> None:
        """Outcome."""
        self._requests.labels(_OUTCOMES.get(type(error), "failed")).inc()

    def stepped(self, num_decoding: int, num_prefilling: int, num_waiting: int, cached_bytes: int) -> None:
        """What the scheduler holds."""
        self._num_decoding = num_decoding
        self._cached.set(cached_bytes)

    def read_engine(self, engine: ServedEngine) -> None:
        """Set the gauges to what the engine holds at this moment."""
        self._queue.set(engine.num_waiting)
        active = engine.num_active
        decoding = min(self._num_decoding, active)
        self._slots.labels("decoding").set(decoding)
        self._slots.labels("prefilling").set(active - decoding)
        free = engine.num_free_slots
        self._slots.labels("free").set(free)
        self._slots.labels("copying").set(max(0, engine.num_slots - active - free))
