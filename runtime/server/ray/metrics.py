"""The engine's metrics in the replicas of a Ray cluster, told to Ray, whose agents export them for Prometheus.

In: what `runtime.server.metrics` makes. Out: the same metrics, with "ray_" before their names, and Serve's labels for
application, deployment and replica. Not covered: collecting them, which is Ray's.
"""

from typing import Any, Self, cast

from prometheus_client import Counter, Gauge, Histogram
from ray.serve import metrics


class RayMetricMaker:
    """A `MetricMaker`; for a process that is a replica."""

    def counter(self, name: str, what: str, *labels: str) -> Counter:
        """See `MetricMaker.counter`."""
        return cast(Counter, _RayMetric(metrics.Counter(name, what, labels), labels))

    def gauge(self, name: str, what: str, *labels: str) -> Gauge:
        """See `MetricMaker.gauge`."""
        return cast(Gauge, _RayMetric(metrics.Gauge(name, what, labels), labels))

    def seconds(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        """See `MetricMaker.seconds`."""
        histogram = metrics.Histogram(f"{name}_seconds", what, boundaries=list(buckets), tag_keys=labels)
        return cast(Histogram, _RayMetric(histogram, labels))


class _RayMetric:
    """A metric of Ray's, with the methods of prometheus-client's."""

    def __init__(self, metric: Any, names: tuple[str, ...], values: tuple[str, ...] = ()) -> None:
        self._metric, self._names = metric, names
        self._tags = dict(zip(names, values, strict=False))

    def labels(self, *values: str) -> Self:
        return type(self)(self._metric, self._names, values)

    def inc(self, amount: float = 1) -> None:
        if amount:  # which Ray refuses
            self._metric.inc(amount, tags=dict(self._tags))

    def set(self, value: float) -> None:
        self._metric.set(value, tags=dict(self._tags))

    def observe(self, value: float) -> None:
        self._metric.observe(value, tags=dict(self._tags))
