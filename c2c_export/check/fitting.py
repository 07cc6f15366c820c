"""Which prompts and questions a bundle can be asked at all, so that a check fails for the engine's faults alone.

In: an engine, what it is to be asked, the receiver's sliding window. Out: the prompts to use, or an error that names
the first prompt or question of a user's file that cannot be. Of the prompts that come with the package, those are used
that can. Where planning itself is broken nothing is refused here: that is for the levels to find.
"""

from collections.abc import Sequence

from c2c_export.check.engine import CheckedEngine
from c2c_export.check.prompts import BUILT_IN, Calibration, CalibrationPrompt
from c2c_export.check.questions import Question
from c2c_export.errors import C2CError, UsageError
from runtime import Message
from runtime.prompt import Plan


def fitting_prompts(
    engine: CheckedEngine, calibration: Calibration, sliding_window: int | None
) -> Sequence[CalibrationPrompt]:
    """See the module's docstring.

    Raises `UsageError` for one of a file that does not fit the capacity, or when none of the package's does.
    """
    fitting: list[CalibrationPrompt] = []
    refusals: list[C2CError] = []
    for number, prompt in enumerate(calibration.prompts):
        try:
            _check_defined(engine.plan(prompt), sliding_window)
        except UsageError as error:
            if calibration.origin != BUILT_IN:
                raise UsageError(f"--prompts: prompt {number} ({prompt.text:.40}): {error}") from error
            refusals.append(error)
        except C2CError as error:  # a chat template that refuses it, or a bundle that is broken
            refusals.append(error)
            if calibration.origin != BUILT_IN:
                return calibration.prompts
        except Exception:  # a damaged bundle makes libraries raise nearly anything
            return calibration.prompts
        else:
            fitting.append(prompt)
    if not fitting and all(isinstance(error, UsageError) for error in refusals):
        raise UsageError(f"no prompt that comes with the package fits, give some with --prompts: {refusals[0]}")
    return fitting or calibration.prompts


def check_askable(engine: CheckedEngine, questions: Sequence[Question]) -> None:
    """Raise `UsageError` for a question that does not fit the capacity, or a choice without tokens of its own.

    Each is planned as the level asks it: for the receiver alone, and with all sharers.
    """
    if not questions:
        return
    try:
        planner = engine.planner
    except Exception:  # as above
        return
    manifest = planner.bundle.manifest
    capacity, num_sharers = manifest.max_length, len(manifest.sharers)
    for number, question in enumerate(questions):
        messages = [Message("user", question.question)]
        try:
            plans = [planner.plan(messages, [], sharers) for sharers in ((), tuple(range(num_sharers)))]
            num_rows = max(len(plan.receiver.ids) + (plan.closing_padding_id is not None) for plan in plans)
            for choice in question.choices:
                length = num_rows + len(planner.continuation_ids(messages, [], [], choice))
                if length > capacity:
                    raise UsageError(f"with {choice!r} it takes {length} tokens, this bundle's capacity is {capacity}")
        except UsageError as error:
            raise UsageError(f"--questions: question {number} ({question.question:.60}): {error}") from error


def _check_defined(plan: Plan, sliding_window: int | None) -> None:
    """Raise `UsageError` where the closing padding row may see no row at all, which no two kernels agree on."""
    if plan.closing_padding_id is None or sliding_window is None:
        return
    gap = plan.num_positions - 1 - int(plan.receiver.position_ids[-1])
    if gap >= sliding_window:
        raise UsageError(
            f"it ends in a gap of {gap} positions, but the receiver's sliding window has {sliding_window}, so that "
            "what its first token is read from sees nothing; expected a shorter gap"
        )
