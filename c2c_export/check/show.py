"""Print a check's report: one table per engine, then what diverged first."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from c2c_export.check.report import CheckReport, EngineReport
from c2c_export.check_record import Divergence, LevelRecord, Measurement

_VERDICTS = {True: "[green]passed[/]", False: "[bold red]FAILED[/]"}


def print_report(report: CheckReport, console: Console) -> None:
    """Print `report` to `console`."""
    for engine in report.engines:
        _print_engine(engine, console)


def _print_engine(engine: EngineReport, console: Console) -> None:
    check = engine.check
    console.print(
        f"[bold]{escape(engine.engine)}[/] against the trained models, {check.num_prompts} prompts: "
        f"{_VERDICTS[check.passed]}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("level", "measurement", "value", "tolerance", "verdict", "s")
    for level in check.levels:
        _add_level(table, level)
    console.print(table)
    if engine.questions:
        console.print(_questions(engine))
    for level in check.levels:
        for divergence in level.divergences:
            console.print(f"[red]{level.name}[/]: {escape(_described(divergence))}", highlight=False, soft_wrap=True)
    if engine.not_kept is not None:
        console.print(f"Not kept in the manifest: {escape(engine.not_kept)}", highlight=False, soft_wrap=True)


def _add_level(table: Table, level: LevelRecord) -> None:
    rows = [(m.name, f"{m.value:.3g}", _bound(m), "" if m.passed else _VERDICTS[False]) for m in level.measurements]
    table.add_row(level.name, "", "", "", _VERDICTS[level.passed], f"{level.seconds:.1f}")
    for row in rows:
        table.add_row("", *row, "")


def _bound(measurement: Measurement) -> str:
    if measurement.at_most is not None:
        return f"at most {measurement.at_most:.3g}"
    return "" if measurement.at_least is None else f"at least {measurement.at_least:.3g}"


def _questions(engine: EngineReport) -> Table:
    table = Table("questions", "asked", "trained: right", "engine: right", "same answers")
    for score in engine.questions:
        shares = (
            "torch only" if share is None else f"{share:.1%}"
            for share in (score.trained, score.engine, score.same_answers)
        )
        table.add_row(score.way, str(score.num_questions), *shares)
    return table


def _described(divergence: Divergence) -> str:
    """Where, then what."""
    places = (
        ("", divergence.graph),
        ("layer ", divergence.layer),
        ("", divergence.kind),
        ("head ", divergence.head),
        ("token ", divergence.token),
    )
    where = ", ".join(f"{name}{value}" for name, value in places if value is not None)
    return f"{where}: {divergence.message}" if where else divergence.message
