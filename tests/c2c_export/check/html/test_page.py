"""The page as a reader's browser parses it: what is in it, what is not, and that no text of a report can change it."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from check_reports import ANSWER, OTHER_ANSWER, QUESTION, make_report, with_first_engine
from html_page import HtmlPage
from pydantic import BaseModel

from c2c_export.check.html import write_html
from c2c_export.check.html.write import render
from c2c_export.check.report import CheckReport
from c2c_export.check_record import LEVELS, CheckRecord, Divergence, LevelRecord, Measurement

HOSTILE = "</style></title><script>alert('x')</script>\" onload='y' <!-- {{ 7 * 7 }} {% raw %} &amp;"


def page_of(report: CheckReport) -> HtmlPage:
    return HtmlPage(render(report))


def numbers_of(value: Any) -> Iterator[float]:
    if isinstance(value, BaseModel):
        yield from (number for name in type(value).model_fields for number in numbers_of(getattr(value, name)))
    elif isinstance(value, tuple):
        yield from (number for each in value for number in numbers_of(each))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_nothing_is_loaded_from_outside_and_nothing_runs():
    page = page_of(make_report())
    html = render(make_report())
    for forbidden in (
        "http",
        "src=",
        "srcset",
        "@import",
        "url(",
        "<script",
        "<link",
        "<iframe",
        "<object",
        "javascript:",
    ):
        assert forbidden not in html.lower()
    assert all((found.get("href") or "#").startswith("#") for _, found in page.elements)
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]


def test_every_number_of_a_report_is_on_the_page():
    report = make_report(layers=3, heads=2, prompts=2, sharers=2)
    page = page_of(report)
    shown = page.attributes | set(page.text.replace(",", " ").replace(":", " ").split())
    missing = [number for number in numbers_of(report) if not {str(number), f"{number:g}"} & shown]
    assert len(list(numbers_of(report))) > 250
    assert missing == []


def test_every_text_of_a_report_is_on_the_page():
    report = make_report()
    text = page_of(report).text
    for expected in (report.bundle, report.receiver, *report.sharers, *report.fusers, QUESTION, ANSWER.strip()):
        assert expected in text
    assert "receiver, layer 2, key, head 1, token 17" in text
    assert report.engines[1].check.levels[1].divergences[0].message in text
    assert "2026-11-27T08:15:30Z" in text
    assert "onnxruntime 1.32.0 torch 2.13.0" in text
    assert "those that come with the package" in text


def test_text_of_a_report_stays_text():
    report = make_report()
    divergence = Divergence(graph=HOSTILE, message=HOSTILE)
    measurement = Measurement(name=HOSTILE, value=1.0, at_most=0.5)
    level = LevelRecord(
        name="caches", passed=False, seconds=1.0, measurements=(measurement,), divergences=(divergence,)
    )
    check = CheckRecord(
        passed=False,
        date=HOSTILE,
        versions={HOSTILE: HOSTILE},
        calibration=HOSTILE,
        num_prompts=1,
        levels=(level,),
    )
    prompts = [
        prompt.model_copy(
            update={
                "prompt": HOSTILE,
                "trained_text": HOSTILE,
                "engine_text": f"no {HOSTILE}",
                "trained_top5": tuple(token.model_copy(update={"text": HOSTILE}) for token in prompt.trained_top5),
            }
        )
        for prompt in report.engines[0].prompts
    ]
    questions = [score.model_copy(update={"way": HOSTILE}) for score in report.engines[0].questions]
    report = with_first_engine(
        report, engine=HOSTILE, target=HOSTILE, precision=HOSTILE, check=check, prompts=prompts, questions=questions
    )
    report = report.model_copy(
        update={"bundle": HOSTILE, "receiver": HOSTILE, "sharers": (HOSTILE,), "fusers": (HOSTILE,)}
    )
    page = page_of(report)
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in page_of(make_report()).elements}
    assert page.texts_of("h1") == [HOSTILE]
    assert page.text.count("alert('x')") > 15
    assert "49" not in page.text.split()
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]


def test_text_cannot_turn_the_page_around_or_hold_what_no_file_can():
    report = make_report().model_copy(update={"bundle": "a\u202eb\x00c\ud800d שלום 👩🏽‍🚀"})
    html = render(report)
    assert HtmlPage(html).texts_of("h1") == ["aU+202Eb␀cU+D800d שלום 👩🏽‍🚀"]
    html.encode()


def test_numbers_that_are_none_are_said_and_drawn():
    report = make_report()
    engine = report.engines[0]
    bad = engine.caches[1].key.model_copy(
        update={"max_error": math.nan, "relative_error": -math.inf, "head_errors": (math.nan, math.inf)}
    )
    caches = [engine.caches[0], engine.caches[1].model_copy(update={"key": bad})]
    projectors = [each.model_copy(update={"key_weight": math.nan}) for each in engine.projectors]
    level = LevelRecord(
        name="caches",
        passed=False,
        seconds=1.0,
        measurements=(Measurement(name="max error", value=math.nan, at_most=0.01),),
    )
    check = engine.check.model_copy(update={"passed": False, "levels": (level,)})
    page = page_of(with_first_engine(report, caches=caches, projectors=projectors, check=check))
    assert "max error is not a number, expected ≤ 0.01" in page.text
    assert "2 not finite, the first in key head 0 in layer 1; the largest is" in page.text
    titles = page.texts_of("title")
    assert "layer 1, key head 0: not a number" in titles
    assert "layer 1, key head 1: ∞" in titles
    crossed = [found for tag, found in page.elements if tag == "path" and found.get("class") == "crossed"]
    # Two heads, one relative error, two colours' legends, every key weight, and the bar of the measurement.
    assert len(crossed) == 2 + 1 + 2 + len(projectors) + 1


def test_a_failed_engine_says_what_failed_first():
    page = page_of(make_report())
    assert "✗ failed 1 of 2 engines passed" in page.text
    assert "First failing level: caches, at receiver, layer 2, key, head 1, token 17" in page.text


def test_a_level_that_failed_without_divergence_names_the_number_that_did():
    level = LevelRecord(
        name="logits",
        passed=False,
        seconds=1.0,
        measurements=(
            Measurement(name="max error", value=0.1, at_most=0.2),
            Measurement(name="top-1 agreement", value=0.5, at_least=0.9),
        ),
    )
    report = make_report()
    check = report.engines[0].check.model_copy(update={"passed": False, "levels": (level,)})
    assert "top-1 agreement is 0.5, expected ≥ 0.9" in page_of(with_first_engine(report, check=check)).text


def test_empty_sections_say_why_they_are():
    report = make_report()
    check = report.engines[0].check.model_copy(update={"levels": ()})
    empty = with_first_engine(report, check=check, caches=(), projectors=(), prompts=(), questions=())
    text = page_of(empty.model_copy(update={"engines": empty.engines[:1]})).text
    for reason in (
        "No level was run.",
        "Not run: sources, weights, graphs, caches, logits, generation, questions.",
        "the level caches was not run",
        "the bundle has no projectors, or no level that reads them was run",
        "neither the level logits nor generation was run",
        "the level generation was not run",
        "no questions were given (--questions FILE)",
    ):
        assert reason in text


def test_a_report_without_engines_has_no_verdict():
    text = page_of(make_report().model_copy(update={"engines": ()})).text
    assert "No engine was checked, so there is no verdict." in text
    assert "passed" not in text


def test_layers_without_heads_are_drawn_without_cells():
    report = make_report(heads=1)
    caches = [
        layer.model_copy(
            update={
                "key": layer.key.model_copy(update={"head_errors": ()}),
                "value": layer.value.model_copy(update={"head_errors": ()}),
            }
        )
        for layer in report.engines[0].caches
    ]
    assert (
        "Largest absolute error by layer and head: no numbers."
        in page_of(with_first_engine(report, caches=caches)).text
    )


def test_answers_that_part_are_shown_with_the_place_and_equal_ones_are_folded_away():
    page = page_of(make_report(prompts=3))
    assert page.texts_of("mark") == ["the Republic of Tatarstan, in Russia.", "Kazakhstan.\nIt lies on the Volga."]
    assert "Prompt 1: 6 of 32 tokens are equal" in page.text
    assert "3 equal answers" in page.text
    assert "2 equal answers" in page.text


def test_an_answer_that_stops_early_is_shown_to_end():
    report = make_report(prompts=1)
    prompt = report.engines[0].prompts[0]
    short = prompt.model_copy(update={"trained_text": OTHER_ANSWER, "engine_text": " Kazan", "common_prefix": 2})
    page = page_of(with_first_engine(report, prompts=(short,)))
    assert page.texts_of("mark") == [OTHER_ANSWER.removeprefix(" Kazan")]
    assert "[from here on different:] ends here" in page.text


def test_equal_texts_of_different_tokens_are_not_called_equal():
    report = make_report(prompts=1)
    prompt = report.engines[0].prompts[0].model_copy(update={"common_prefix": 3})
    text = page_of(with_first_engine(report, prompts=(prompt,))).text
    assert "Both texts are the same, though their tokens part." in text


def test_gates_that_equal_another_engines_are_drawn_once():
    page = page_of(make_report())
    descriptions = [found["aria-label"] for tag, found in page.elements if tag == "svg" and "aria-label" in found]
    assert len([text for text in descriptions if text and text.startswith("Sharer 0:")]) == 1
    assert "As those of ort-cpu-fp32, number for number." in page.text
    targets = {found["id"] for _, found in page.elements if "id" in found}
    links = {found["href"] or "" for tag, found in page.elements if tag == "a"}
    assert "#engine0-gates" in links
    assert {link.removeprefix("#") for link in links} <= targets


def test_screen_readers_find_headings_in_order_captions_and_descriptions():
    page = page_of(make_report())
    tags = [tag for tag, _ in page.elements]
    levels = [int(tag[1]) for tag in tags if tag in {"h1", "h2", "h3", "h4", "h5"}]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert tags.count("table") == tags.count("caption") > 10
    for tag, found in page.elements:
        if tag == "svg":
            assert found.get("aria-hidden") == "true" or (found.get("role") == "img" and found.get("aria-label"))
        if tag == "th":
            assert found.get("scope") in {"row", "col", "rowgroup"}
        if found.get("class") == "scroll":
            assert found.get("tabindex") == "0"
            assert found.get("aria-label")
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))


def test_a_large_report_stays_a_file_that_can_be_mailed():
    assert len(render(make_report(layers=60, heads=16, prompts=30, sharers=2))) < 3e6


def test_the_file_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("before")
    write_html(make_report(), path)
    assert path.read_text(encoding="utf-8") == render(make_report())
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="absent"):
        write_html(make_report(), tmp_path / "absent" / "report.html")


def test_a_sharer_alone_is_asked_in_torch_only():
    assert "sharer 0 56.2 % asked in torch only: a bundle has no LM head of it 64" in page_of(make_report()).text


def test_a_pass_of_some_levels_is_not_shown_as_a_pass_of_all():
    report = make_report()
    sentence = "Not run: weights, graphs, questions. The engine is not marked as passed in its bundle"
    assert page_of(report).text.count(sentence) == 1
    levels = tuple(LevelRecord(name=name, passed=True, seconds=1.0) for name in LEVELS if name != "questions")
    check = report.engines[0].check.model_copy(update={"levels": levels})
    text = page_of(with_first_engine(report, check=check)).text
    assert "Not run: questions." in text
    assert "not marked as passed" not in text
