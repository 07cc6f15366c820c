"""`c2c-export check`: run the levels over each engine of a bundle, keep the results in the manifest, and report.

In: `CheckOptions`. Out: a `CheckReport`, and the manifest with each engine's `CheckRecord`. All levels run, also after
one has failed; a level that cannot be run has failed, and says why. The manifest is changed at the very end, only if

- an engine failed, in whichever levels were asked for, or
- it passed and every level ran that needs no further files (all but `questions`): with fewer, nothing is proved.

Not covered: the levels themselves (`levels/`), and showing the report (`show.py`, `html/`).
"""

import importlib
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import torch

from c2c_export import __version__
from c2c_export.atomic_file import write_atomically
from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.check.bisect.search import bisect
from c2c_export.check.engine import CheckedEngine
from c2c_export.check.fitting import check_askable, fitting_prompts
from c2c_export.check.html import write_html
from c2c_export.check.level import CheckContext, Level, LevelResult
from c2c_export.check.levels.caches import check_caches
from c2c_export.check.levels.generation import check_generation
from c2c_export.check.levels.graphs import check_graphs
from c2c_export.check.levels.logits import check_logits
from c2c_export.check.levels.questions import check_questions
from c2c_export.check.levels.sources import check_sources
from c2c_export.check.levels.weights import check_weights
from c2c_export.check.options import CheckOptions
from c2c_export.check.prompt_details import describe_prompt
from c2c_export.check.prompts import Calibration, read_calibration
from c2c_export.check.questions import read_questions
from c2c_export.check.report import CheckReport, EngineReport, PromptDetails
from c2c_export.check.selection import engines_to_check, keep_check
from c2c_export.check.trained.pair import TrainedPair
from c2c_export.check_record import LEVELS, CheckRecord, Divergence, LevelName, LevelRecord
from c2c_export.errors import C2CError, UsageError, reason_of
from c2c_export.progress import Step
from c2c_export.quiet import quiet_libraries
from engines.cores import check_threads
from engines.targets import target_of

MANDATORY: frozenset[LevelName] = frozenset(LEVELS) - {"questions"}
"""What an engine must pass to be marked as passed."""
_PROMPT_LEVELS: tuple[LevelName, ...] = ("logits", "generation")
_RUN: dict[LevelName, Level] = {
    "sources": check_sources,
    "weights": check_weights,
    "graphs": check_graphs,
    "caches": check_caches,
    "logits": check_logits,
    "generation": check_generation,
    "questions": check_questions,
}


def run_check(options: CheckOptions, step: Step) -> CheckReport:
    """Check what `options` ask for, and keep and write the results.

    Raises `UsageError` for wrong options and prompts, `C2CError` where a source is missing or this machine cannot run
    an engine. An engine that fails is no error: it is in the report. An interrupt leaves the manifest as it was.
    """
    levels = _levels_of(options)
    calibration = read_calibration(options.prompts)
    questions = () if options.questions is None else read_questions(options.questions)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    with quiet_libraries():
        with step("Reading the bundle"):
            bundle = Bundle.open(options.bundle)
        engines = engines_to_check(bundle, options.engine, options.precision)
        with step("Loading the trained models"):
            trained = TrainedPair.load(bundle.manifest, options)
        reports = []
        for name, record in engines.items():
            context = _context(options, bundle, name, record, trained, calibration)
            check_askable(context.engine, questions)
            reports.append(_check_engine(context, levels, calibration.origin, step))
            del context  # one engine at a time is in memory
    manifest = bundle.manifest
    report = CheckReport(
        bundle=str(options.bundle),
        receiver=_described(trained.receiver_source.source, manifest.receiver.architecture),
        sharers=tuple(
            _described(source.source, sharer.model.architecture)
            for source, sharer in zip(trained.sharer_sources, manifest.sharers, strict=True)
        ),
        fusers=tuple(options.fusers) or tuple(sharer.fuser_source for sharer in manifest.sharers),
        engines=tuple(reports),
    )
    for engine in report.engines:
        if is_kept(engine.check):
            keep_check(bundle.root, engine.engine, engines[engine.engine], engine.check)
    if options.json_file is not None:
        write_atomically(options.json_file, (report.model_dump_json(indent=1) + "\n").encode())
    if options.report is not None:
        write_html(report, options.report)
    return report


def is_kept(check: CheckRecord) -> bool:
    """Whether a result goes into the manifest, see the module's docstring."""
    return not check.passed or {level.name for level in check.levels} >= MANDATORY


def _levels_of(options: CheckOptions) -> list[LevelName]:
    """The levels to run, in their order. Raises `UsageError` for options out of range."""
    unknown = sorted(set(options.levels) - set(LEVELS))
    if unknown:
        raise UsageError(f"--level {unknown[0]}: expected one of {', '.join(LEVELS)}")
    if "questions" in options.levels and options.questions is None:
        raise UsageError("--level questions: expected a file of questions, with --questions")
    if options.new_tokens < 1:
        raise UsageError(f"--new-tokens {options.new_tokens}: expected at least 1")
    if options.num_threads is not None:
        check_threads("--threads", options.num_threads)
    for option, path in (("--json", options.json_file), ("--report", options.report)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(f"{option} {path}: expected the name of a file in a folder that exists")
    wanted = {*options.levels, *(("questions",) if options.questions is not None else ())}
    return [level for level in LEVELS if level in wanted]


def _context(
    options: CheckOptions,
    bundle: Bundle,
    name: str,
    record: EngineRecord,
    trained: TrainedPair,
    calibration: Calibration,
) -> CheckContext:
    # With this engine alone, so that the runtime can choose no other of the same target and precision.
    alone = Bundle(bundle.root, bundle.manifest.model_copy(update={"engines": {name: record}}))
    engine = CheckedEngine(alone, record, options.num_threads)
    return CheckContext(
        options=options,
        bundle=alone,
        name=name,
        record=record,
        trained=trained,
        engine=engine,
        prompts=fitting_prompts(engine, calibration, trained.receiver_source.shape.sliding_window),
    )


def _check_engine(context: CheckContext, levels: Sequence[LevelName], calibration: str, step: Step) -> EngineReport:
    """Run the levels over one engine."""
    records: list[LevelRecord] = []
    results: dict[LevelName, LevelResult] = {}
    for name in levels:
        with step(f"{context.name}: {name}"):
            started = time.perf_counter()
            results[name] = _run_level(_RUN[name], context)
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
    return EngineReport(
        engine=context.name,
        target=context.record.target,
        precision=context.record.precision,
        check=check,
        caches=tuple(layer for result in found for layer in result.caches),
        projectors=tuple(projector for result in found for projector in result.projectors),
        prompts=_details(context, results),
        questions=tuple(score for result in found for score in result.questions),
    )


def _run_level(level: Level, context: CheckContext) -> LevelResult:
    """What the level found. Whatever it raises is a failure of the engine or of what it was given, and is recorded."""
    try:
        return level(context)
    except C2CError as error:
        reason = reason_of(error)
    except Exception as error:  # damaged graphs and weights make libraries raise nearly anything
        reason = f"{type(error).__name__}: {reason_of(error)}"
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


def _described(source: str, architecture: str) -> str:
    return f"{source} ({architecture})"
