"""Run the levels over one engine.

In: a level's context, and which levels. Out: an `EngineReport`. All levels run, also after one has failed. A level that
a damaged engine keeps from running has failed, and says why; one that this machine or a wrong use keeps from running
says nothing about the engine, and ends its check with an error.
"""

import importlib
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from c2c_export import __version__
from c2c_export.bundle import EngineRecord
from c2c_export.check.bisect.search import bisect
from c2c_export.check.keep import why_not_kept
from c2c_export.check.level import CheckContext, Level, LevelResult
from c2c_export.check.levels.caches import check_caches
from c2c_export.check.levels.generation import check_generation
from c2c_export.check.levels.graphs import check_graphs
from c2c_export.check.levels.logits import check_logits
from c2c_export.check.levels.questions import check_questions
from c2c_export.check.levels.sources import check_sources
from c2c_export.check.levels.weights import check_weights
from c2c_export.check.machine_failure import NotCheckedError, machine_failure
from c2c_export.check.prompt_details import describe_prompt
from c2c_export.check.report import EngineReport, PromptDetails
from c2c_export.check_record import CheckRecord, Divergence, LevelName, LevelRecord
from c2c_export.errors import C2CError, UsageError, reason_of
from c2c_export.progress import Step
from engines.targets import target_of

RUN: dict[LevelName, Level] = {
    "sources": check_sources,
    "weights": check_weights,
    "graphs": check_graphs,
    "caches": check_caches,
    "logits": check_logits,
    "generation": check_generation,
    "questions": check_questions,
}
_PROMPT_LEVELS: tuple[LevelName, ...] = ("logits", "generation")


def check_engine(
    context: CheckContext, levels: Sequence[LevelName], calibration: str, step: Step, problems: list[str]
) -> EngineReport:
    """Run the levels over one engine. What could only not be described to a reader is added to `problems`.

    Raises `NotCheckedError` where the machine keeps a level from running, and `UsageError` where what was asked for
    does, unless an earlier level has failed: that is kept whatever comes after.
    """
    records: list[LevelRecord] = []
    results: dict[LevelName, LevelResult] = {}
    for name in levels:
        with step(f"{context.name}: {name}"):
            started = time.perf_counter()
            try:
                results[name] = _run_level(RUN[name], context)
            except (NotCheckedError, UsageError) as error:
                if all(result.passed for result in results.values()):
                    raise
                results[name] = _not_run(reason_of(error))
            seconds = time.perf_counter() - started
        if name == "graphs" and context.options.bisect and not results[name].passed:
            with step(f"{context.name}: bisecting"):
                results[name] = _bisect_each(context, results[name])
        records.append(_record_of(name, results[name], seconds))
    check = CheckRecord(
        passed=all(record.passed for record in records),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(context.record),
        calibration=calibration,
        num_prompts=len(context.prompts),
        levels=tuple(records),
    )
    found = list(results.values())
    try:
        prompts = _details(context, results)
    except Exception as error:  # a description is not worth losing the results for
        prompts = ()
        problems.append(f"{context.name}: the prompts cannot be described: {type(error).__name__}: {reason_of(error)}")
    return EngineReport(
        engine=context.name,
        target=context.record.target,
        precision=context.record.precision,
        check=check,
        not_kept=why_not_kept(context, check),
        caches=tuple(layer for result in found for layer in result.caches),
        projectors=tuple(projector for result in found for projector in result.projectors),
        prompts=prompts,
        questions=tuple(score for result in found for score in result.questions),
    )


def _run_level(level: Level, context: CheckContext) -> LevelResult:
    """What the level found; what a damaged engine makes it raise is a failure. Raises as `check_engine`."""
    try:
        return level(context)
    except UsageError:
        raise
    except Exception as error:  # damaged graphs and weights make libraries raise nearly anything
        failure = machine_failure(error, context.bundle.root)
        if failure is not None:
            raise NotCheckedError(failure) from error
        kind = "" if isinstance(error, C2CError) else f"{type(error).__name__}: "
        return _not_run(f"{kind}{reason_of(error)}")


def _not_run(reason: str) -> LevelResult:
    return LevelResult(divergences=[Divergence(message=f"the level could not be run: {reason}")])


def _bisect_each(context: CheckContext, result: LevelResult) -> LevelResult:
    """The same result, the divergence of each graph followed by what bisecting that graph found."""

    def followed(divergence: Divergence) -> Divergence:
        try:
            return bisect(context, divergence)
        except Exception as error:  # as in a level
            message = f"{divergence.message} Bisect: the graph could not be run: {reason_of(error)}"
            return divergence.model_copy(update={"message": message})

    return replace(result, divergences=[followed(divergence) for divergence in result.divergences])


def _record_of(name: LevelName, result: LevelResult, seconds: float) -> LevelRecord:
    return LevelRecord(
        name=name,
        passed=result.passed,
        seconds=round(seconds, 3),
        measurements=tuple(result.measurements),
        divergences=tuple(result.divergences),
    )


def _details(context: CheckContext, results: Mapping[LevelName, LevelResult]) -> tuple[PromptDetails, ...]:
    """The prompts on both sides, where both levels that compare them were run."""
    compared = [results.get(name, LevelResult()) for name in _PROMPT_LEVELS]
    if not all(result.measurements for result in compared):
        return ()
    return tuple(describe_prompt(context, prompt) for prompt in context.prompts)


def _versions(record: EngineRecord) -> dict[str, str]:
    names = ["torch", "transformers", "polygraphy"]
    versions = {"c2c-export": __version__, **{name: importlib.metadata.version(name) for name in names}}
    module = target_of(record.target).module
    versions[module] = str(importlib.import_module(module).__version__)
    return versions
