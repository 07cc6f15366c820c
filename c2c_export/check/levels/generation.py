"""Level `generation`: greedy answers to the prompts, the engine's against the trained models'.

    common prefix                 the share of the trained models' tokens that the engine gives too, from the first on
    gap at the first difference   where the answers part, by how much the trained logits prefer their own token to the
                                  engine's, by the spread of those logits; 0 where they never part

    gap of any token, own weights only where weights are rounded to integers: the trained modules hold the engine's own
                                  weights and read the engine's tokens; at the worst step, by how much they prefer
                                  another token to the engine's, by the spread

Greedy decoding follows the best logit, however near the second lies, so a rounding error may part two answers for good:
the prefix alone proves nothing. Up to where they part both have read the same tokens, so the gap is judged by what the
logits' error explains, in each precision. Not covered: what follows the first difference, where
weights are not rounded to integers.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from c2c_export.check.both_sides import BothGenerations, generate_both, logits_of_own_weights
from c2c_export.check.held_pair import OWN_WEIGHTS, is_compared_with_own_weights
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.prompts import CalibrationPrompt
from c2c_export.check.tolerances import measured
from c2c_export.check_record import Divergence

_GAP = "gap at the first difference"
_OWN_GAP = f"gap of any token{OWN_WEIGHTS}"


def check_generation(context: CheckContext) -> LevelResult:
    """See the module's docstring. Raises `C2CError` where the engine cannot be run."""
    precision = context.record.precision
    sides = [generate_both(context, prompt) for prompt in context.prompts]
    gaps = [gap_at_the_first_difference(both) for both in sides]
    prefix = np.mean([both.common_prefix / len(both.trained.token_ids) for both in sides])
    worst = measured("generation", _GAP, precision, float(np.max(gaps)))
    numbered = enumerate(zip(context.prompts, sides, gaps, strict=True))
    divergences = [
        _divergence(context, number, prompt, both, gap)
        for number, (prompt, both, gap) in numbered
        if not measured("generation", _GAP, precision, gap).passed or _stops_elsewhere(both)
    ]
    measurements = [measured("generation", "common prefix", precision, float(prefix)), worst]
    if is_compared_with_own_weights(precision):
        own = [_gaps_with_own_weights(context, prompt) for prompt in context.prompts]
        measurements.append(measured("generation", _OWN_GAP, precision, float(np.max([np.max(gaps) for gaps in own]))))
        divergences = [*_first_with_own_weights(context, own), *divergences]
        context.held.release()  # the last level that compares with it
    return LevelResult(measurements, divergences[:1])


def _gaps_with_own_weights(context: CheckContext, prompt: CalibrationPrompt) -> list[float]:
    """The gap of every token of the engine's answer, see the module's docstring."""
    steps = logits_of_own_weights(context, prompt)
    return [float((logits.max() - logits[token]) / logits.std()) for token, logits in steps]


def _first_with_own_weights(context: CheckContext, gaps: Sequence[Sequence[float]]) -> Iterator[Divergence]:
    """The first token of each prompt that rounding activations does not explain."""
    for number, (prompt, of_tokens) in enumerate(zip(context.prompts, gaps, strict=True)):
        wrong = [measured("generation", _OWN_GAP, context.record.precision, gap) for gap in of_tokens]
        first = next((index for index, gap in enumerate(wrong) if not gap.passed), None)
        if first is not None:
            token = context.engine.generate(prompt, context.options.new_tokens).token_ids[first]
            yield Divergence(
                graph="receiver",
                message=f"prompt {number} ({prompt.text:.40}): new token {first} is {token}; the trained modules with "
                f"the engine's own weights prefer another by {of_tokens[first]:.3g} of the logits' spread, expected "
                f"at most {wrong[first].at_most:.3g}",
            )


def gap_at_the_first_difference(both: BothGenerations) -> float:
    """See the module's docstring; also 0 where one answer only stops before the other."""
    first = both.common_prefix
    if first in (len(both.trained.token_ids), len(both.engine.token_ids)):
        return 0.0
    logits = both.trained.logits[first]
    own, engines = both.trained.token_ids[first], both.engine.token_ids[first]
    return float((logits[own] - logits[engines]) / logits.std())


def _stops_elsewhere(both: BothGenerations) -> bool:
    """Whether one side ends where the other goes on with the same tokens: their stop tokens differ."""
    lengths = len(both.trained.token_ids), len(both.engine.token_ids)
    return both.common_prefix == min(lengths) < max(lengths)


def _divergence(
    context: CheckContext, number: int, prompt: CalibrationPrompt, both: BothGenerations, gap: float
) -> Divergence:
    first = both.common_prefix
    where = f"prompt {number} ({prompt.text:.40})"
    if _stops_elsewhere(both):
        longer = "engine" if len(both.engine.token_ids) > first else "trained model"
        last = both.trained.token_ids[first - 1]
        message = f"{where}: after token {last} the {longer} goes on, the other stops; the stop tokens differ"
    else:
        own, engines = both.trained.token_ids[first], both.engine.token_ids[first]
        decode = context.engine.pipeline.tokenizer.decode
        message = (
            f"{where}: new token {first} is {engines} ({decode([engines])!r}), expected {own} ({decode([own])!r}), "
            f"which the trained logits prefer by {gap:.3g} of their spread, more than rounding explains"
        )
    return Divergence(graph="receiver", message=message)
