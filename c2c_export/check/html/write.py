"""Fill the page's templates with a report and write the file."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from c2c_export.atomic_file import write_atomically
from c2c_export.check.html.allowance import describe_share, tolerance_text, used_share
from c2c_export.check.html.cache_heatmap import draw_head_errors, draw_relative_errors
from c2c_export.check.html.gate_chart import describe_gates, draw_gates
from c2c_export.check.html.numbers import difference_in_points, number, percentage
from c2c_export.check.html.parting import part
from c2c_export.check.html.tolerance_bar import draw_tolerance_bar
from c2c_export.check.html.verdict import (
    MEANINGS,
    circumstances,
    compared_measurements,
    first_failure,
    levels_not_run,
    place,
)
from c2c_export.check.html.visible_text import readable, visible_token
from c2c_export.check.report import CheckReport, EngineReport, ProjectorDetails, PromptDetails
from c2c_export.check_record import LevelName, Measurement


def write_html(report: CheckReport, path: Path) -> None:
    """Write `report` to `path` as one HTML file, whole or not at all. Raises `OSError`."""
    write_atomically(path, render(report).encode(errors="replace"))


def render(report: CheckReport) -> str:
    """The page as text, to be encoded as UTF-8."""
    return _environment().get_template("report.html").render(report=report)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("c2c_export.check.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (
        circumstances,
        compared_measurements,
        describe_gates,
        describe_share,
        difference_in_points,
        draw_gates,
        draw_head_errors,
        draw_relative_errors,
        draw_tolerance_bar,
        first_failure,
        first_with_equal_projectors,
        levels_not_run,
        measurement_of,
        number,
        part,
        percentage,
        place,
        prompts_that_part,
        sharers_with_projectors,
        tolerance_text,
        used_share,
        visible_token,
    )
    environment.globals.update({function.__name__: function for function in functions}, MEANINGS=MEANINGS)
    return environment


def _finalize(value: Any) -> Any:
    # Whatever a template prints passes here, so that no text can be forgotten.
    return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def sharers_with_projectors(projectors: Sequence[ProjectorDetails]) -> list[tuple[int, list[ProjectorDetails]]]:
    """Each sharer's number and its projectors, in the order of the receiver's layers."""
    ordered = sorted(projectors, key=lambda each: (each.sharer, each.receiver_layer))
    return [(sharer, list(group)) for sharer, group in groupby(ordered, lambda each: each.sharer)]


def first_with_equal_projectors(engines: Sequence[EngineReport], engine: EngineReport) -> EngineReport:
    """The first of `engines` whose projectors are those of `engine`, which may be itself."""
    return next((other for other in engines if other.projectors == engine.projectors), engine)


def prompts_that_part(prompts: Sequence[PromptDetails], whether: bool) -> list[tuple[int, PromptDetails]]:
    """The prompts whose answers differ, in tokens or in text, or those whose answers do not; each with its number.

    Prompts are counted from 0, as in the messages of the levels.
    """
    return [
        (number, prompt)
        for number, prompt in enumerate(prompts)
        if whether == (prompt.common_prefix < prompt.num_generated or prompt.trained_text != prompt.engine_text)
    ]


def measurement_of(engine: EngineReport, level: LevelName, name: str) -> Measurement | None:
    """The measurement of that name in that level of the engine's check; None if it has none."""
    for record in engine.check.levels:
        for measurement in record.measurements:
            if (record.name, measurement.name) == (level, name):
                return measurement
    return None
