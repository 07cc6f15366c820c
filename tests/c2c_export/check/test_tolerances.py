"""The table of tolerances: complete, ordered by precision, and told with the reason."""

from pathlib import Path

import pytest

from c2c_export.check.tolerances import _TABLE, measured, tolerance
from c2c_export.check_record import LEVELS

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")


@pytest.mark.parametrize("finer_to_coarser", [("fp32", "fp16", "bf16"), ("fp32", "int8", "int4")])
@pytest.mark.parametrize("key", _TABLE, ids=lambda key: f"{key[0]}-{key[1]}")
def test_a_coarser_precision_is_never_held_to_a_tighter_bound(key, finer_to_coarser):
    level, name = key
    bounds = [tolerance(level, name, precision) for precision in finer_to_coarser]
    assert all(bound.reason for bound in bounds)
    upper = [bound.at_most for bound in bounds if bound.at_most is not None]
    assert upper == sorted(upper)
    lower = [bound.at_least for bound in bounds if bound.at_least is not None]
    assert lower == sorted(lower, reverse=True)


def test_rows_are_in_the_order_of_the_levels():
    levels = [LEVELS.index(level) for level, _ in _TABLE]
    assert levels == sorted(levels)


def test_a_measurement_without_a_row_is_only_told():
    assert measured("logits", "mean error", "fp32", 99.0).passed


def test_a_number_beyond_its_bound_does_not_pass_and_neither_does_one_that_is_none():
    assert measured("caches", "row error", "fp32", 1e-6).passed
    assert not measured("caches", "row error", "fp32", 1.0).passed
    assert not measured("caches", "row error", "int4", float("nan")).passed
    assert not measured("logits", "top-1 agreement", "fp32", 0.5).passed
    assert measured("logits", "top-1 agreement", "int4", 0.5).passed


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}".replace("e-0", "e-")


def table_in_markdown() -> list[str]:
    """The documentation's table: each row that is not 0 in every precision."""
    lines = [
        "| level | measurement | fp32 | fp16 | bf16 | int8 | int4 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (level, name), row in _TABLE.items():
        bounds = [getattr(row, precision) for precision in PRECISIONS]
        if any(bounds):
            side = "at least" if row.is_lower_bound else "at most"
            lines.append(f"| `{level}` | {name}, {side} | {' | '.join(map(number, bounds))} |")
    return lines


def test_the_documentation_has_this_table():
    text = (Path(__file__).parents[3] / "docs" / "check.md").read_text()
    assert "\n".join(["", *table_in_markdown(), ""]) in text
