"""`c2c-export check`: run the levels over each engine of a bundle, keep the results in the manifest, and report.

In: `CheckOptions`. Out: a `CheckReport`, and the manifest with each engine's `CheckRecord`. Four steps: select the
engines, run the levels over each, write the reports, and keep the results; what goes wrong with one engine or one file
is listed as a problem and leaves the others their results. The manifest is changed at the very end, see `keep.py`.

Not covered: the levels themselves (`run_levels.py`, `levels/`), and showing the report (`show.py`, `html/`).
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from c2c_export.atomic_file import write_atomically
from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.check.engine import CheckedEngine
from c2c_export.check.fitting import check_askable, fitting_prompts
from c2c_export.check.html import write_html
from c2c_export.check.keep import keep_check
from c2c_export.check.level import CheckContext
from c2c_export.check.options import CheckOptions
from c2c_export.check.prompts import Calibration, read_calibration
from c2c_export.check.questions import Question, read_questions
from c2c_export.check.report import CheckReport, EngineReport
from c2c_export.check.run_levels import check_engine
from c2c_export.check.selection import engines_to_check
from c2c_export.check.trained.pair import TrainedPair
from c2c_export.check_record import LEVELS, LevelName
from c2c_export.errors import C2CError, UsageError, reason_of
from c2c_export.progress import Step
from c2c_export.quiet import quiet_libraries
from engines.cores import check_threads


@dataclass(frozen=True)
class _Asked:
    """What every engine is asked."""

    levels: Sequence[LevelName]
    calibration: Calibration
    questions: Sequence[Question]


def run_check(options: CheckOptions, step: Step) -> CheckReport:
    """Check what `options` ask for, and keep and write the results.

    Raises `UsageError` for wrong options and prompts, `C2CError` where a source is missing or this machine can run none
    of the engines. An engine that fails is no error, and neither is one that could not be checked or whose result could
    not be kept or written: both are in the report. An interrupt leaves the manifest as it was.
    """
    levels = _levels_of(options)
    questions = () if options.questions is None else read_questions(options.questions)
    asked = _Asked(levels, read_calibration(options.prompts), questions)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    with quiet_libraries():
        with step("Reading the bundle"):
            bundle = Bundle.open(options.bundle)
        engines, obstacles = engines_to_check(bundle, options.engine, options.precision)
        with step("Loading the trained models"):
            trained = TrainedPair.load(bundle.manifest, options)
        problems = [f"{name} was not checked: {obstacle}" for name, obstacle in obstacles.items()]
        reports = _check_each(options, bundle, engines, trained, asked, step, problems)
    report = _report_of(options, bundle, trained, reports, problems)
    problems += _write(options, report)
    problems += _keep(bundle, engines, report)
    return report.model_copy(update={"problems": tuple(problems)})


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
    if options.save_results is not None:
        _check_folder("--save-results", options.save_results)
    wanted = {*options.levels, *(("questions",) if options.questions is not None else ())}
    return [level for level in LEVELS if level in wanted]


def _check_folder(option: str, folder: Path) -> None:
    """Make the folder and try to write in it, before hours of work are to end there. Raises `UsageError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option} {folder}: {error.strerror}; expected a folder that can be written") from error


def _check_each(
    options: CheckOptions,
    bundle: Bundle,
    engines: Mapping[str, EngineRecord],
    trained: TrainedPair,
    asked: _Asked,
    step: Step,
    problems: list[str],
) -> list[EngineReport]:
    """Each engine's report; why one has none, or says nothing about its engine, is added to `problems`.

    Raises `UsageError` for what no engine can be asked, as long as no engine's result would be lost by it.
    """

    def check_one(name: str, record: EngineRecord) -> EngineReport:
        """In a function of its own, so that one engine at a time is in memory."""
        context = _context(options, bundle, name, record, trained, asked.calibration)
        check_askable(context.engine, asked.questions)
        return check_engine(context, asked.levels, asked.calibration.origin, step, problems)

    reports: list[EngineReport] = []
    for name, record in engines.items():
        try:
            report = check_one(name, record)
        except Exception as error:
            if isinstance(error, UsageError) and not reports:
                raise
            kind = "" if isinstance(error, C2CError) else f"{type(error).__name__}: "
            problems.append(f"{name} could not be checked: {kind}{reason_of(error)}")
            continue
        reports.append(report)
        if report.not_kept is not None and not report.check.passed:
            problems.append(f"{name} could not be checked: {report.not_kept}")
    return reports


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


def _report_of(
    options: CheckOptions, bundle: Bundle, trained: TrainedPair, reports: list[EngineReport], problems: list[str]
) -> CheckReport:
    manifest = bundle.manifest
    return CheckReport(
        bundle=str(options.bundle),
        receiver=_described(trained.receiver_source.source, manifest.receiver.architecture),
        sharers=tuple(
            _described(source.source, sharer.model.architecture)
            for source, sharer in zip(trained.sharer_sources, manifest.sharers, strict=True)
        ),
        fusers=tuple(options.fusers) or tuple(sharer.fuser_source for sharer in manifest.sharers),
        engines=tuple(reports),
        problems=tuple(problems),
    )


def _write(options: CheckOptions, report: CheckReport) -> list[str]:
    """Write the files that were asked for. Why one could not be written, if so."""
    problems = []
    if options.json_file is not None:
        try:
            write_atomically(options.json_file, (report.model_dump_json(indent=1) + "\n").encode())
        except OSError as error:
            problems.append(f"--json {options.json_file}: cannot be written: {reason_of(error)}")
    if options.report is not None:
        try:
            write_html(report, options.report)
        except Exception as error:  # templates raise their own kinds
            problems.append(f"--report {options.report}: cannot be written: {reason_of(error)}")
    return problems


def _keep(bundle: Bundle, engines: Mapping[str, EngineRecord], report: CheckReport) -> list[str]:
    """Put into the manifest what is to be kept. Why a result could not be, if so."""
    problems = []
    for engine in report.engines:
        if engine.not_kept is not None:
            continue
        try:
            keep_check(bundle, engine.engine, engines[engine.engine], engine.check)
        except (C2CError, OSError) as error:
            problems.append(f"{engine.engine}: the result is not kept: {reason_of(error)}")
    return problems


def _described(source: str, architecture: str) -> str:
    return f"{source} ({architecture})"
