"""What a reader sees of one calibration prompt: both sides' likeliest first tokens, and what both answer.

In: a level's context and one of its prompts. Out: `PromptDetails` for the report. Nothing here is judged.
"""

import numpy as np
from numpy.typing import NDArray

from c2c_export.check.both_sides import generate_both, prefill_both
from c2c_export.check.level import CheckContext
from c2c_export.check.levels.logits import agreements, centred, kl_divergence
from c2c_export.check.prompts import CalibrationPrompt
from c2c_export.check.report import PromptDetails, TokenLogit
from c2c_export.errors import one_line

_MAX_PROMPT = 300
_TOP = 5


def describe_prompt(context: CheckContext, prompt: CalibrationPrompt) -> PromptDetails:
    """Run both sides, where no level did so before, and describe what they gave. Raises as `C2CPipeline.prefill`."""
    both, generations = prefill_both(context, prompt), generate_both(context, prompt)
    trained, engine = both.trained.logits, both.engine.logits
    error = np.abs(centred(engine) - centred(trained))
    trained_best, engine_best = _best(trained), _best(engine)
    top1_equal, top5_share = agreements(trained, engine)
    tokenizer = context.engine.pipeline.tokenizer

    def described(logits: NDArray[np.float32], best: list[int]) -> tuple[TokenLogit, ...]:
        return tuple(
            TokenLogit(token_id=token, text=tokenizer.decode([token]), logit=float(logits[token])) for token in best
        )

    return PromptDetails(
        prompt=one_line(prompt.text, _MAX_PROMPT),
        num_tokens=len(both.engine.plan.receiver.ids),
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        kl_divergence=kl_divergence(trained, engine),
        top1_equal=top1_equal,
        top5_shared=round(top5_share * len(trained_best)),
        trained_top5=described(trained, trained_best),
        engine_top5=described(engine, engine_best),
        trained_text=tokenizer.decode(generations.trained.token_ids, skip_special_tokens=True),
        engine_text=generations.engine.text,
        common_prefix=generations.common_prefix,
        num_generated=len(generations.trained.token_ids),
    )


def _best(logits: NDArray[np.float32]) -> list[int]:
    """The likeliest tokens, the first of equally likely ones first."""
    return [int(token) for token in np.argsort(-logits, kind="stable")[:_TOP]]
