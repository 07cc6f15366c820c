"""Prompts and questions that a bundle cannot be asked: left out of the package's own, refused by name of a file's."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checked_bundles import context_of

from c2c_export.check.fitting import check_askable, fitting_prompts
from c2c_export.check.prompts import BUILT_IN, Calibration, CalibrationPrompt, read_calibration
from c2c_export.check.questions import Question
from c2c_export.errors import C2CError, UsageError
from runtime import Message
from runtime.prompt import ModelTokens, Plan

PAIR = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(PAIR)
SHORT, LONG = (CalibrationPrompt(input_ids=(5,) * count) for count in (8, 300))


@pytest.fixture
def engine(recorded_bundle: Callable[[str], Path]) -> Any:
    return context_of(recorded_bundle(PAIR), PAIR).engine


def test_of_the_packages_prompts_those_that_fit_are_taken(engine: Any):
    assert fitting_prompts(engine, Calibration((LONG, SHORT), BUILT_IN), None) == [SHORT]
    assert len(fitting_prompts(engine, read_calibration(None), None)) >= 5


def test_a_prompt_of_a_file_that_does_not_fit_is_named(engine: Any):
    with pytest.raises(UsageError, match=r"--prompts: prompt 1 \(5 5 5.*the prompt takes 300 tokens"):
        fitting_prompts(engine, Calibration((SHORT, LONG), "sha256"), None)


def test_none_that_fits_is_an_error(engine: Any):
    with pytest.raises(UsageError, match="give some with --prompts: the prompt takes 300 tokens"):
        fitting_prompts(engine, Calibration((LONG,), BUILT_IN), None)


@pytest.mark.parametrize("error", [C2CError("the template refuses"), IndexError("broken")])
def test_where_planning_is_broken_the_levels_get_all_prompts(error: Exception):
    def plan(_: CalibrationPrompt) -> Plan:
        raise error

    broken: Any = SimpleNamespace(plan=plan)
    assert fitting_prompts(broken, Calibration((SHORT, LONG), BUILT_IN), None) == (SHORT, LONG)


@pytest.mark.parametrize(("window", "fits"), [(None, True), (9, True), (8, False)])
def test_a_closing_padding_row_must_see_something(window: int | None, fits: bool):
    tokens = ModelTokens(np.arange(4), np.arange(4))
    plan = Plan((), tokens, {}, num_positions=12, closing_padding_id=0)  # the row lies at 11, the last token at 3
    engine: Any = SimpleNamespace(plan=lambda _: plan)
    calibration = Calibration((SHORT,), "sha256")
    if fits:
        assert fitting_prompts(engine, calibration, window) == [SHORT]
    else:
        with pytest.raises(UsageError, match="ends in a gap of 8 positions"):
            fitting_prompts(engine, calibration, window)


@pytest.mark.parametrize("too_long_for", [(), (0, 1)])
def test_a_question_is_planned_for_the_receiver_alone_and_with_all_sharers(too_long_for: tuple[int, ...]):
    def make_plan(_: list[Message], ids: list[int], sharers: tuple[int, ...]) -> Plan:
        count = 10 if sharers == too_long_for else 4
        return Plan((), ModelTokens(np.arange(count), np.arange(count)), {}, count, closing_padding_id=None)

    manifest = SimpleNamespace(max_length=10, sharers=["first", "second"])
    bundle = SimpleNamespace(manifest=manifest)
    planner = SimpleNamespace(plan=make_plan, continuation_ids=lambda *_: [1, 2], bundle=bundle)
    engine: Any = SimpleNamespace(planner=planner)
    with pytest.raises(
        UsageError, match=r"--questions: question 0 .* it takes 12 tokens, this bundle's capacity is 10"
    ):
        check_askable(engine, [Question(question="Why?", choices=("yes", "no"), answer=0)])


def test_a_question_that_does_not_fit_is_named(engine: Any):
    short = Question(question="Why?", choices=("yes", "no"), answer=0)
    check_askable(engine, [short])
    with pytest.raises(UsageError, match=r"--questions: question 1 \(Why\?\): with 'no no"):
        check_askable(engine, [short, Question(question="Why?", choices=("no " * 300, "no"), answer=0)])
