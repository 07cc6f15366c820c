"""Numbers, text, colours and shares, each compared with what was worked out by hand or another way."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2c_export.check.html.allowance import describe_share, tolerance_text, used_share
from c2c_export.check.html.log_colours import NUM_COLOURS, LogColours
from c2c_export.check.html.numbers import difference_in_points, exact, number, percentage, short
from c2c_export.check.html.parting import Parting, part
from c2c_export.check.html.tolerance_bar import draw_tolerance_bar
from c2c_export.check.html.verdict import place
from c2c_export.check.html.visible_text import readable, visible_token
from c2c_export.check_record import Divergence, Measurement


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1, "1"),
        (0.0312499, "0.03125"),
        (1.5e-7, "1.5e-7"),
        (123456.0, "1.235e5"),
        (-2.5, "-2.5"),
        (math.nan, "not a number"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_a_number_has_four_digits_at_most(value: float, expected: str):
    assert short(value) == expected


@given(st.floats(allow_nan=False))
def test_the_exact_number_can_be_read_again_and_the_short_one_is_near(value: float):
    assert float(exact(value)) == value
    if abs(value) < 1e308:
        assert math.isclose(float(short(value)), value, rel_tol=6e-4)


def test_an_exact_number_is_a_title_only_where_digits_are_left_out():
    assert str(number(0.5)) == '<span class="number">0.5</span>'
    assert str(number(0.123456)) == '<span class="number" title="0.123456">0.1235</span>'
    assert str(number(math.nan)) == '<span class="number">not a number</span>'


def test_shares_are_per_cent_and_differences_have_a_sign():
    assert ">43.8 %<" in percentage(0.4375)
    assert 'title="0.4375"' in percentage(0.4375)
    assert ">not a number<" in percentage(math.nan)
    assert ">−1.6<" in difference_in_points(0.421875, 0.4375)
    assert ">+1.6<" in difference_in_points(0.4375, 0.421875)
    assert ">not a number<" in difference_in_points(math.inf, math.inf)


@pytest.mark.parametrize(
    ("value", "at_most", "at_least", "expected"),
    [
        (0.05, 0.1, None, 0.5),
        (0.2, 0.1, None, 2.0),
        (0.95, None, 0.9, 0.5),
        (0.8, None, 0.9, 2.0),
        (1.0, None, 1.0, 0.0),
        (0.5, None, 1.0, math.inf),
        (16.0, None, 8.0, 0.5),
        (0.0, None, 8.0, math.inf),
        (0.0, 0.0, None, 0.0),
        (0.1, 0.1, None, 1.0),
        (1e-9, 0.0, None, math.inf),
        (0.0, 0.1, None, 0.0),
        (0.3, 0.4, 0.2, 0.875),
        (7.0, None, None, None),
    ],
)
def test_a_tolerance_is_used_up_at_one(
    value: float, at_most: float | None, at_least: float | None, expected: float | None
):
    measurement = Measurement(name="x", value=value, at_most=at_most, at_least=at_least)
    assert used_share(measurement) == (None if expected is None else pytest.approx(expected))
    if expected not in {None, 1.0}:
        assert measurement.passed == (expected < 1)


def test_a_value_that_is_none_uses_no_share_of_its_tolerance():
    share = used_share(Measurement(name="x", value=math.nan, at_most=0.1, at_least=0.0))
    assert share is not None
    assert math.isnan(share)


def test_shares_and_tolerances_in_words():
    assert [describe_share(share) for share in (0.0, 1e-5, 0.123, 1.0, 2.345, 12345.0, math.inf, math.nan)] == [
        "0 %",
        "below 1 %",
        "12 %",
        "100 %",
        "2.3 times",
        "1.2e4 times",
        "∞ times",
        "not a number",
    ]
    assert tolerance_text(Measurement(name="x", value=1, at_most=0.01, at_least=0.001)) == "≤ 0.01 and ≥ 0.001"


def test_a_bar_reaches_its_line_at_the_tolerance_and_ends_in_an_arrow_beyond_the_scale():
    assert 'class="within" x="0" y="4" width="88"' in draw_tolerance_bar(1.0, True)
    assert 'd="M88 0v16"' in draw_tolerance_bar(1.0, True)
    assert 'class="beyond" x="0" y="4" width="110"' in draw_tolerance_bar(10.0, False)
    assert draw_tolerance_bar(1e9, False).count('class="beyond"') == 2
    assert "crossed" in draw_tolerance_bar(math.nan, False)


@given(
    st.lists(st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False), min_size=1, max_size=8)
)
def test_every_positive_number_has_the_colour_whose_range_holds_it(values: list[float]):
    colours = LogColours.spanning(values)
    legend = colours.legend()
    assert 1 <= len(legend) <= NUM_COLOURS
    assert len({name for name, _ in legend}) == len(legend)
    for value in values:
        step = [name for name, _ in legend].index(colours.css_class(value))
        assert colours.edges[step] <= value
        assert value < colours.edges[step + 1] or colours.edges[step + 1] == math.inf


def test_steps_of_colour_are_round_numbers_as_fine_as_there_are_colours():
    assert [text for _, text in LogColours.spanning([1.5e-3, 4e-2]).legend()] == [
        "0.001 to 0.002",
        "0.002 to 0.005",
        "0.005 to 0.01",
        "0.01 to 0.02",
        "0.02 to 0.05",
    ]
    assert [text for _, text in LogColours.spanning([2e-6, 2e-3]).legend()][:2] == ["1e-6 to 3e-6", "3e-6 to 1e-5"]
    assert next(text for _, text in LogColours.spanning([2e-9, 2e-3]).legend()) == "1e-9 to 1e-8"
    assert LogColours.spanning([1e-3]).css_class(1e-3) == "step4"
    assert [name for name, _ in LogColours.spanning([1.0, 2.0]).legend()] == ["step0", "step8"]


def test_what_has_no_place_on_a_logarithmic_scale_has_a_class_of_its_own():
    colours = LogColours.spanning([0.0, math.nan, 1e-3])
    assert [colours.css_class(value) for value in (0.0, -1.0, math.nan, math.inf)] == [
        "zero",
        "zero",
        "unbounded",
        "unbounded",
    ]
    assert LogColours.spanning([0.0, math.nan]).legend() == []


def test_white_space_and_what_has_no_shape_is_seen_in_a_token():
    assert visible_token(" a\n").striptags() == "·a↵"
    assert visible_token("\t\r\u00a0\u200b\x00").striptags() == "→␍U+00A0U+200B␀"
    assert visible_token("\u0301") == "◌\u0301"
    assert visible_token("").striptags() == "empty"
    assert visible_token("<b>") == "&lt;b&gt;"


def test_readable_text_keeps_what_scripts_and_emoji_need():
    for kept in ("a\tb\nc", "می‌خواهم", "👩🏽‍🚀", "नमस्ते", "שלום"):
        assert readable(kept) == kept
    assert readable("\u202e\x1b\x7f\x85") == "U+202E␛U+007FU+0085"


@pytest.mark.parametrize(
    ("trained", "engine", "expected"),
    [
        ("abc", "abd", Parting("ab", "c", "d")),
        ("abc", "abc", Parting("abc", "", "")),
        ("ab", "abc", Parting("ab", "", "c")),
        ("", "x", Parting("", "", "x")),
        ("xe\u0301", "xe", Parting("x", "e\u0301", "e")),
        ("x👩🏽‍🚀", "x👩🏻‍🚀", Parting("x", "👩🏽‍🚀", "👩🏻‍🚀")),
        ("x👩‍🚀", "x👩‍🔬", Parting("x", "👩‍🚀", "👩‍🔬")),
        ("x🇩🇪", "x🇩🇰", Parting("x", "🇩🇪", "🇩🇰")),
    ],
)
def test_texts_part_at_a_whole_character(trained: str, engine: str, expected: Parting):
    assert part(trained, engine) == expected


@given(st.text(), st.text(), st.text())
def test_parted_texts_can_be_put_together_again(common: str, trained: str, engine: str):
    parting = part(common + trained, common + engine)
    assert parting.common + parting.trained_rest == common + trained
    assert parting.common + parting.engine_rest == common + engine
    assert parting.texts_are_equal == (trained == engine)


def test_a_place_names_what_is_known_of_it():
    assert place(Divergence(message="x")) == ""
    assert place(Divergence(graph="fuser0", layer=0, kind="value", head=0, token=0, message="x")) == (
        "fuser0, layer 0, value, head 0, token 0"
    )
    assert place(Divergence(layer=3, message="x")) == "layer 3"
