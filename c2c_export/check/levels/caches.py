"""Level `caches`: the receiver's fused caches after each prompt, the engine's against the trained models'.

Two numbers, each the worst of all layers, of K and of V:

    row error        a row's error (the length of the difference of two vectors [D]) by the length of the trained one,
                     or by the typical length of that cache's rows where the row is shorter; the worst row
    relative error   root mean square of a whole cache's error by that of the trained cache

Where weights are rounded to integers, both are also measured against the trained modules holding the engine's own
weights ("own weights"): what rounding them costs is no error there, and a fault cannot hide in it.

Polygraphy's `Comparator` compares both sides' outputs prompt by prompt. Where one leaves its tolerance, the divergence
names the lowest such layer, and in it the first prompt, K before V, the first token and its worst head.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import BaseCompareFunc, Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from c2c_export.check.both_sides import BothPrompts, prefill_both, prefill_with_own_weights
from c2c_export.check.comparing import RowsResult, RowsThreshold, row_errors
from c2c_export.check.held_pair import OWN_WEIGHTS, is_compared_with_own_weights
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.report import CacheError, LayerCaches, ProjectorDetails
from c2c_export.check.tolerances import measured, tolerance
from c2c_export.check_record import Divergence, Kind, Measurement

_TRAINED, _ENGINE = "trained", "engine"
_KINDS: tuple[Kind, Kind] = ("key", "value")
_Cache = TypeVar("_Cache")


class _CompareRows(BaseCompareFunc):
    """Polygraphy's comparison of one prompt: every row of every cache [Ht,n,Dt]."""

    _RESULT_CLASS = RowsResult

    def __init__(self, row_error: float) -> None:
        self._threshold = RowsThreshold(row_error)

    def thresholds_for(self, output_name: str) -> RowsThreshold:
        """See `BaseCompareFunc.thresholds_for`."""
        return self._threshold

    def __call__(self, iter_result0: IterationResult, iter_result1: IterationResult) -> "OrderedDict[str, RowsResult]":
        """Compare the engine, the second, with the trained models, the first."""
        return OrderedDict(
            (name, RowsResult(row_errors(trained, iter_result1[name])[None], (), self._threshold))
            for name, trained in iter_result0.items()
        )


@dataclass(frozen=True)
class _Judged:
    """The engine's caches against those of one torch side."""

    measurements: Sequence[Measurement]
    layers: Sequence[LayerCaches]
    first: Divergence | None


def check_caches(context: CheckContext) -> LevelResult:
    """See the module's docstring. Raises `C2CError` where the engine cannot be run."""
    both = [prefill_both(context, prompt) for prompt in context.prompts]
    judged = _judge(context, both, "")
    measurements, divergences = list(judged.measurements), [judged.first]
    if is_compared_with_own_weights(context.record.precision):
        own = _judge(context, [prefill_with_own_weights(context, prompt) for prompt in context.prompts], OWN_WEIGHTS)
        measurements += own.measurements
        divergences.insert(0, own.first)  # the sharper one
    return LevelResult(
        measurements=measurements,
        divergences=[divergence for divergence in divergences if divergence is not None][:1],
        caches=judged.layers,
        projectors=_projectors(context, both),
    )


def _judge(context: CheckContext, both: Sequence[BothPrompts], suffix: str) -> _Judged:
    """Measure the engine's caches; `suffix` ends the names of the measurements."""
    precision = context.record.precision
    row_error = tolerance("caches", f"row error{suffix}", precision).at_most
    relative_error = tolerance("caches", f"relative error{suffix}", precision).at_most
    assert row_error is not None
    assert relative_error is not None
    compared = _compare(both, row_error)
    layers = [
        LayerCaches(layer=layer, key=_cache_error(both, layer, "key"), value=_cache_error(both, layer, "value"))
        for layer in range(context.trained.receiver.num_layers)
    ]
    relative = [(layer.layer, kind, error) for layer in layers for kind, error in _errors_of(layer)]
    worst_row = max(result.relative_error for results in compared for result in results.values())
    worst_cache = float(np.max([error.relative_error for _, _, error in relative]))  # not max(), which may miss a NaN
    return _Judged(
        measurements=[
            measured("caches", f"row error{suffix}", precision, worst_row),
            measured("caches", f"relative error{suffix}", precision, worst_cache),
        ],
        layers=layers,
        first=_first_row(context, both, compared) or _first_cache(relative, relative_error),
    )


def _compare(both: Sequence[BothPrompts], row_error: float) -> list[OrderedDict[str, RowsResult]]:
    """Results by cache name, prompt by prompt."""
    results = RunResults()
    trained, engine = [], []
    for prompt in both:
        rows, found = prompt.trained.rows, prompt.engine
        expected = {name: layer[0].numpy() for name, layer in _named(rows.keys, rows.values)}
        trained.append(IterationResult(expected, runner_name=_TRAINED))
        engine.append(IterationResult(dict(_named(found.keys, found.values)), runner_name=_ENGINE))
    results.append((_TRAINED, trained))
    results.append((_ENGINE, engine))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=_CompareRows(row_error))
    return list(accuracy[_TRAINED, _ENGINE])


def _named(keys: Sequence[_Cache], values: Sequence[_Cache]) -> list[tuple[str, _Cache]]:
    """Every layer's cache with its name, in the order in which a decoder computes them."""
    pairs = enumerate(zip(keys, values, strict=True))
    return [(f"{kind}.{layer}", cache) for layer, pair in pairs for kind, cache in zip(_KINDS, pair, strict=True)]


def _cache_error(both: Sequence[BothPrompts], layer: int, kind: Kind) -> CacheError:
    """Errors of one cache over all prompts."""
    trained = np.concatenate([_of_trained(prompt, layer, kind) for prompt in both], axis=1).astype(np.float64)
    engine = np.concatenate([_of_engine(prompt, layer, kind) for prompt in both], axis=1).astype(np.float64)
    error = np.abs(engine - trained)  # [Ht,n,Dt], the rows of all prompts
    typical = np.sqrt(np.mean(np.square(trained)))
    return CacheError(
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        relative_error=float(np.sqrt(np.mean(np.square(error))) / typical),
        head_errors=tuple(float(head) for head in error.max(axis=(1, 2))),
    )


def _of_trained(both: BothPrompts, layer: int, kind: Kind) -> NDArray[np.float32]:
    rows = both.trained.rows
    cache: NDArray[np.float32] = (rows.keys if kind == "key" else rows.values)[layer][0].numpy()
    return cache


def _of_engine(both: BothPrompts, layer: int, kind: Kind) -> NDArray[np.float32]:
    return (both.engine.keys if kind == "key" else both.engine.values)[layer]


def _errors_of(layer: LayerCaches) -> tuple[tuple[Kind, CacheError], tuple[Kind, CacheError]]:
    return (("key", layer.key), ("value", layer.value))


def _first_row(
    context: CheckContext, both: Sequence[BothPrompts], compared: Sequence["OrderedDict[str, RowsResult]"]
) -> Divergence | None:
    """The first row beyond its tolerance, in the order of the module's docstring."""
    for layer in range(context.trained.receiver.num_layers):
        for number, results in enumerate(compared):
            for kind in _KINDS:
                result = results[f"{kind}.{layer}"]
                if result:
                    continue
                errors = result.errors[0]  # [Ht,n]
                token = int(np.flatnonzero((errors > result.tolerance).any(axis=0))[0])
                head = int(errors[:, token].argmax())
                rows_off = int((errors > result.tolerance).any(axis=0).sum())
                return Divergence(
                    graph="receiver",
                    layer=layer,
                    kind=kind,
                    head=head,
                    token=token,
                    message=f"prompt {number} ({context.prompts[number].text:.40}): the row is off by "
                    f"{errors[head, token]:.3g} of its length, expected at most {result.tolerance:.3g}; "
                    f"{rows_off} of {errors.shape[1]} tokens of this layer's {kind}s are off. "
                    + _what_happened(both[number], layer, kind),
                )
    return None


def _what_happened(both: BothPrompts, layer: int, kind: Kind) -> str:
    """A guess at the cause, from what the engine's cache looks like."""
    found, other = _of_engine(both, layer, kind), _of_trained(both, layer, "value" if kind == "key" else "key")
    expected = _of_trained(both, layer, kind)
    if np.abs(found - other).mean() < 0.5 * np.abs(found - expected).mean():
        return f"It looks like the layer's {'values' if kind == 'key' else 'keys'}."
    return "Lower layers are within their tolerance."


def _first_cache(errors: Sequence[tuple[int, Kind, CacheError]], allowed: float) -> Divergence | None:
    """The first cache that is off as a whole, although no row of it is off by itself."""
    for layer, kind, error in errors:
        if not error.relative_error <= allowed:
            return Divergence(
                graph="receiver",
                layer=layer,
                kind=kind,
                message=f"the {kind}s of all prompts are off by {error.relative_error:.3g} of their root mean square, "
                f"expected at most {allowed:.3g}",
            )
    return None


def _projectors(context: CheckContext, both: Sequence[BothPrompts]) -> list[ProjectorDetails]:
    """Gates as trained, and the mean weights over all prompts."""
    weights = [weight for prompt in both for weight in prompt.trained.weights]
    details = []
    for number, fuser in enumerate(context.trained.fusers):
        for link in fuser.checkpoint.links:
            projector = fuser.checkpoint.projectors[link.projector]
            used = [w for w in weights if (w.sharer, w.receiver_layer) == (number, link.receiver_layer)]
            details.append(
                ProjectorDetails(
                    sharer=number,
                    receiver_layer=link.receiver_layer,
                    sharer_layer=link.sharer_layer,
                    projector=link.projector,
                    key_gate_logit=float(projector.state["key_gate_logit"]),
                    value_gate_logit=float(projector.state["value_gate_logit"]),
                    key_gate_open=projector.key_gate_open,
                    value_gate_open=projector.value_gate_open,
                    key_weight=sum(w.key for w in used) / max(len(used), 1),
                    value_weight=sum(w.value for w in used) / max(len(used), 1),
                )
            )
    return details
