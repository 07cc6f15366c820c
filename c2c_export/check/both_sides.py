"""One calibration prompt on both sides: the trained models in torch, and the engine as users run it.

In: a level's context and one of its prompts. Out: what both made of it. Both sides keep their results, so levels that
ask for the same prompt compute it once. The prompt is planned once, by the runtime: how text becomes tokens is a matter
of the level `sources`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from c2c_export.check.engine import EnginePrompt
from c2c_export.check.level import CheckContext
from c2c_export.check.prompts import CalibrationPrompt
from c2c_export.check.trained.answer import TrainedGeneration, TrainedPrompt
from runtime import Generation


@dataclass(frozen=True, eq=False)
class BothPrompts:
    """A prompt, prefilled and fused by both."""

    trained: TrainedPrompt
    """Of the trained models, or of the same with the engine's own weights."""
    engine: EnginePrompt


@dataclass(frozen=True, eq=False)
class BothGenerations:
    """A prompt, answered greedily by both."""

    trained: TrainedGeneration
    engine: Generation

    @property
    def common_prefix(self) -> int:
        """How many tokens are equal from the first on."""
        pairs = zip(self.trained.token_ids, self.engine.token_ids, strict=False)
        equal = [trained == engine for trained, engine in pairs]
        return equal.index(False) if False in equal else len(equal)


def prefill_both(context: CheckContext, prompt: CalibrationPrompt) -> BothPrompts:
    """Raises `UsageError` where the prompt does not fit the bundle."""
    engine = context.engine.prefill(prompt)
    mode = context.bundle.manifest.fusion_mode
    return BothPrompts(context.trained.answers.prefill(engine.plan, mode), engine)


def prefill_with_own_weights(context: CheckContext, prompt: CalibrationPrompt) -> BothPrompts:
    """As `prefill_both`, the trained side holding the engine's own weights; `C2CError` where they cannot be read."""
    engine = context.engine.prefill(prompt)
    mode = context.bundle.manifest.fusion_mode
    return BothPrompts(context.held.answers(context).prefill(engine.plan, mode), engine)


def logits_of_own_weights(
    context: CheckContext, prompt: CalibrationPrompt
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Each token of the engine's greedy answer, and the logits [V] that it was to be the best of.

    The torch side holds the engine's own weights and reads the engine's tokens, so that every step is compared, also
    behind one where another token is as likely. Raises as `prefill_with_own_weights`.
    """
    both = prefill_with_own_weights(context, prompt)
    receiver = context.held.answers(context).receiver
    rows, logits = both.trained.rows, both.trained.logits
    token_ids = context.engine.generate(prompt, context.options.new_tokens).token_ids
    for number, token in enumerate(token_ids):
        yield token, logits
        if number + 1 < len(token_ids):
            rows, logits = receiver.extend(rows, [token], [both.trained.next_position + number])


def generate_both(context: CheckContext, prompt: CalibrationPrompt) -> BothGenerations:
    """As `prefill_both`; both end at the stop tokens that each has from its own source."""
    plan = context.engine.prefill(prompt).plan
    manifest = context.bundle.manifest
    room = manifest.max_length - len(plan.receiver.ids) + 1
    trained = context.trained.answers.generate(
        plan, manifest.fusion_mode, min(context.options.new_tokens, room), context.trained.receiver_source.stop_ids
    )
    return BothGenerations(trained, context.engine.generate(prompt, context.options.new_tokens))
