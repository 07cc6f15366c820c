"""Level `logits`: the logits of each prompt's last token, the engine's against the trained models'.

Numbers are the worst of all prompts, but for the agreements, which are shares:

    relative error    the largest error of a logit by the spread (standard deviation) of the trained logits
    mean error        the mean absolute error by the same
    KL divergence     of the engine's distribution from the trained one, in nats
    top-1 agreement   prompts on which both give the same likeliest token
    top-5 agreement   of the trained models' five likeliest tokens, those that are among the engine's five

Where weights are rounded to integers, the relative error is also measured against the trained modules holding the
engine's own weights ("own weights"), so that no fault hides in what rounding costs.

A number that is added to all logits changes no probability, so the logits' means are taken away first. Likeliest tokens
that are as good as equal, nearer than float32 rounding can tell apart, count as agreeing.
"""

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from c2c_export.check.both_sides import BothPrompts, prefill_both, prefill_with_own_weights
from c2c_export.check.held_pair import OWN_WEIGHTS, is_compared_with_own_weights
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.tolerances import measured, tolerance
from c2c_export.check_record import Divergence

_TRAINED, _ENGINE = "trained", "engine"
_TOP = 5

Floats = NDArray[np.float32]


def check_logits(context: CheckContext) -> LevelResult:
    """See the module's docstring. Raises `C2CError` where the engine cannot be run."""
    precision = context.record.precision
    sides = [prefill_both(context, prompt) for prompt in context.prompts]
    trained = [centred(both.trained.logits) for both in sides]
    engine = [centred(both.engine.logits) for both in sides]
    relative, means = _relative_errors(sides)
    divergences_of_prompts = [kl_divergence(t, e) for t, e in zip(trained, engine, strict=True)]
    tops = [agreements(t, e) for t, e in zip(trained, engine, strict=True)]
    values = {
        # np.max, as max() may miss what is not a number
        "relative error": float(np.max(relative)),
        "mean error": float(np.max(means)),
        "KL divergence": float(np.max(divergences_of_prompts)),
        "top-1 agreement": float(np.mean([first for first, _ in tops])),
        "top-5 agreement": float(np.mean([share for _, share in tops])),
    }
    worst = relative
    if is_compared_with_own_weights(precision):
        own, _ = _relative_errors([prefill_with_own_weights(context, prompt) for prompt in context.prompts])
        name = f"relative error{OWN_WEIGHTS}"
        values[name] = float(np.max(own))
        if not measured("logits", name, precision, values[name]).passed:
            worst = own  # the sharper one
    measurements = [measured("logits", name, precision, value) for name, value in values.items()]
    return LevelResult(
        measurements=measurements,
        divergences=[] if all(m.passed for m in measurements) else [_worst(context, worst, divergences_of_prompts)],
    )


def centred(logits: Floats) -> Floats:
    """Logits [V] less their mean."""
    return logits - logits.mean()


def tie(trained: Floats) -> float:
    """How near two of these logits [V] must lie for float32 rounding to swap them."""
    allowed = tolerance("logits", "relative error", "fp32").at_most
    assert allowed is not None
    return 2 * allowed * float(trained.std())


def kl_divergence(trained: Floats, engine: Floats) -> float:
    """Of the engine's distribution from the trained one, in nats, of logits [V]."""
    expected, found = (_log_softmax(logits.astype(np.float64)) for logits in (trained, engine))
    return float((np.exp(expected) * (expected - found)).sum())


def agreements(trained: Floats, engine: Floats) -> tuple[bool, float]:
    """Whether the likeliest token is the same, and the share of the five likeliest that is; ties as in the module."""
    ranked = np.sort(trained)[::-1]
    top = min(_TOP, len(trained))
    found = np.argsort(-engine, kind="stable")[:top]
    allowed = tie(trained)
    first = bool(trained[found[0]] >= ranked[0] - allowed)
    shared = trained[found] >= ranked[top - 1] - allowed
    return first, float(shared.mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _relative_errors(sides: list[BothPrompts]) -> tuple[list[float], list[float]]:
    """The largest and the mean error of each prompt, by the spread of the torch side's logits."""
    trained = [centred(both.trained.logits) for both in sides]
    largest, means = _errors(trained, [centred(both.engine.logits) for both in sides])
    spreads = [float(logits.std()) for logits in trained]
    relative, mean = (
        [error / spread for error, spread in zip(errors, spreads, strict=True)] for errors in (largest, means)
    )
    return relative, mean


def _errors(trained: list[Floats], engine: list[Floats]) -> tuple[list[float], list[float]]:
    """The largest and the mean absolute error of each prompt, by Polygraphy's own comparison."""
    results = RunResults()
    for name, side in ((_TRAINED, trained), (_ENGINE, engine)):
        results.append((name, [IterationResult({"logits": logits}, runner_name=name) for logits in side]))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        compare = SimpleCompareFunc(check_error_stat="max", rtol=0.0)
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=compare)
    compared = [iteration["logits"] for iteration in accuracy[_TRAINED, _ENGINE]]
    return [result.max_absdiff for result in compared], [result.mean_absdiff for result in compared]


def _worst(context: CheckContext, errors: list[float], divergences: list[float]) -> Divergence:
    """The prompt that is furthest off."""
    number = int(np.argmax(errors))
    return Divergence(
        graph="receiver",
        token=len(context.engine.prefill(context.prompts[number]).plan.receiver.ids) - 1,
        message=f"prompt {number} ({context.prompts[number].text:.40}): the logits of its last token are off by up to "
        f"{errors[number]:.3g} of their spread, KL divergence {divergences[number]:.3g}",
    )
