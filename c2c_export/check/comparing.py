"""How far an engine's outputs are from the trained modules', row by row: a `CompareFunc` for Polygraphy's `Comparator`.

In: both sides' outputs of one feed. Out, for each output, a `RowsResult`: the error of every slot, head and written
row, relative to the size of what the trained modules give there, and the rows that changed although the call does not
write them.

The error of a row is the length of the difference of its two vectors [D] by the length of the trained one, or by the
root mean square length of all written rows of that cache where the row is shorter, so that a row near zero counts
little. A fuser's rows are compared by their *corrections*, what was added to the cache, which may be far smaller than
the cache. What storing a value in the engine's type rounds off is no error. Logits are one row per slot, with their
mean taken away: adding a number to all of them changes no probability.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import BaseCompareFunc, CompareResult, IterationResult, Threshold

from c2c_export.check.feeds.feed import GraphFeed
from engines.base import loaded, stored

LOGITS = "logits"
ENDLESS = 1e9
"""The error of a row that is not finite, or that is not zero where it should be; itself a number, which JSON has."""
_PAST = "past_"
_METRICS = ["relative_error", "changed_rows"]
_LEAST_CORRECTION = 1e-3
"""A correction below this share of the cache is not compared by its own size: where a weight is nearly 0, a sigmoid's
last bits are most of it."""
# float32 has 24 bits of mantissa, float16 11, bfloat16 8.
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class RowsThreshold(Threshold):
    """The largest relative error of a row that is tolerated; rows that the call does not write must not change."""

    METRIC_FIELDS = _METRICS

    def __init__(self, relative_error: float) -> None:
        self.relative_error = relative_error

    def passed(self, metric_values: Mapping[str, float]) -> bool:
        """See the class; an error that is not a number is not tolerated."""
        return metric_values["relative_error"] <= self.relative_error and metric_values["changed_rows"] == 0

    def describe(self, metric_values: Mapping[str, float]) -> tuple[str, bool]:
        """One line for Polygraphy's log."""
        error, changed = metric_values["relative_error"], metric_values["changed_rows"]
        line = f"relative error {error:.3g} (tolerance {self.relative_error:.3g}), {changed:.0f} other rows changed"
        return line, self.passed(metric_values)


class RowsResult(CompareResult):
    """One output of one feed, compared."""

    _THRESHOLD_CLASS = RowsThreshold

    def __init__(
        self, errors: NDArray[np.float64], changed: Sequence[tuple[int, int, int]], thresholds: RowsThreshold
    ) -> None:
        super().__init__(thresholds=thresholds)
        self.errors = errors
        """Relative errors [B,H,S] of the written rows; [B,1,1] of logits. `ENDLESS` where a value is not finite."""
        self.changed = changed
        """Slot, head and row of what changed although it was not written."""

    @property
    def relative_error(self) -> float:
        """The largest of all rows."""
        return float(self.errors.max(initial=0.0))

    @property
    def changed_rows(self) -> int:
        """How many rows of how many heads changed although the call does not write them."""
        return len(self.changed)

    @property
    def tolerance(self) -> float:
        """What `relative_error` may be."""
        return float(self.thresholds.relative_error)


@dataclass(frozen=True)
class Tolerances:
    """Largest relative errors of one graph's outputs."""

    caches: float
    """Of a decoder's caches, or of a fuser's corrections."""
    logits: float = 0.0


class CompareRows(BaseCompareFunc):
    """See the module's docstring. One for each feed, as it knows which rows the call writes."""

    _RESULT_CLASS = RowsResult

    def __init__(
        self, feed: GraphFeed, dtypes: Mapping[str, str], tolerances: Tolerances, *, corrections: bool
    ) -> None:
        """`dtypes` are those in which the engine stores its outputs; `corrections` is for fusers."""
        self._feed = feed
        self._dtypes = dtypes
        self._tolerances = tolerances
        self._corrections = corrections

    def thresholds_for(self, output_name: str) -> RowsThreshold:
        """See `BaseCompareFunc.thresholds_for`."""
        logits = output_name == LOGITS
        return RowsThreshold(self._tolerances.logits if logits else self._tolerances.caches)

    def __call__(self, iter_result0: IterationResult, iter_result1: IterationResult) -> "OrderedDict[str, RowsResult]":
        """Compare the engine, the second, with the trained modules, the first: the outputs that both have."""
        both = (name for name in in_order(iter_result1.keys()) if name in iter_result0)
        return OrderedDict((name, self._compare(name, iter_result0[name], iter_result1[name])) for name in both)

    def _compare(self, name: str, trained: NDArray[Any], found: NDArray[Any]) -> RowsResult:
        rounding = _ROUNDING[self._dtypes[name]]
        threshold = self.thresholds_for(name)
        if name == LOGITS:
            allowed = rounding * np.abs(trained)
            trained, found = (logits - logits.mean(-1, keepdims=True) for logits in (trained, found))
            return RowsResult(row_errors(trained, found, allowed), (), threshold)
        fed = self._feed.inputs[_PAST + name]
        was, expected, got = (rows_of(cache, self._feed.written) for cache in (fed, trained, found))
        allowed = rounding * np.abs(expected)
        least = 0.0
        if self._corrections:
            was = _as_stored(was, self._dtypes[name])
            # Both sides add the correction to the cache, and round the sum.
            allowed, least = 2 * allowed, _LEAST_CORRECTION * _typical_length(expected)
            expected, got = expected - was, got - was
        errors = row_errors(expected, got, allowed, least)
        return RowsResult(errors, self._changed(name, fed, found), threshold)

    def _changed(self, name: str, fed: NDArray[Any], found: NDArray[Any]) -> list[tuple[int, int, int]]:
        differs = (found != _as_stored(fed, self._dtypes[name])).any(-1)  # [B,H,C]
        for slot, rows in enumerate(self._feed.written):
            differs[slot, :, rows.start : rows.stop] = False
        return [(int(slot), int(head), int(row)) for slot, head, row in np.argwhere(differs)]


def in_order(names: Sequence[str]) -> list[str]:
    """Outputs in the order in which a decoder computes them: by layer, keys first, logits last."""
    return sorted(names, key=lambda name: (name == LOGITS, layer_of(name), not name.startswith("key")))


def layer_of(name: str) -> int:
    """The layer of a cache output; -1 of the logits."""
    return -1 if name == LOGITS else int(name.rpartition(".")[2])


def rows_of(cache: NDArray[Any], written: Sequence[range]) -> NDArray[Any]:
    """The written rows [B,H,S,D] of a cache [B,H,C,D]; every slot writes the same number."""
    return np.stack([cache[slot, :, rows.start : rows.stop] for slot, rows in enumerate(written)])


def row_errors(
    expected: NDArray[Any], got: NDArray[Any], allowed: NDArray[Any] | float = 0.0, least: float = 0.0
) -> NDArray[np.float64]:
    """Relative errors [...] of vectors [...,D] as the module's docstring says.

    `allowed` is taken off the error of each element; `least` is the smallest length that errors are divided by.
    """
    finite = np.isfinite(got).all(-1)
    difference = np.abs(np.where(finite[..., None], got, 0.0).astype(np.float64) - expected)
    lengths = np.linalg.norm(expected.astype(np.float64), axis=-1)
    scale = np.maximum(lengths, max(_typical_length(expected), least))
    errors = np.linalg.norm(np.maximum(difference - allowed, 0.0), axis=-1)
    relative = np.divide(errors, scale, out=np.where(errors > 0, ENDLESS, 0.0), where=scale > 0)
    return np.where(finite, relative, ENDLESS)


def _typical_length(rows: NDArray[Any]) -> float:
    """The root mean square length of vectors [...,D]."""
    squares = np.square(rows.astype(np.float64)).sum(-1)
    return float(np.sqrt(np.mean(squares))) if squares.size else 0.0


def _as_stored(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """What a buffer of `dtype` gives back of `array`."""
    return loaded(stored(array, dtype), dtype).astype(np.float32)
