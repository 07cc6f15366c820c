"""Whatever numbers and text a report holds, its page is well formed and has no element that another report lacks."""

import math

from check_reports import make_report, with_first_engine
from html_page import HtmlPage
from hypothesis import given, settings
from hypothesis import strategies as st

from c2c_export.check.html.write import render
from c2c_export.check.report import CheckReport
from c2c_export.check_record import LevelRecord, Measurement

numbers = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 5e-324, 1.7e308, math.nan, math.inf, -math.inf, 1.0]))


def tags_of(report: CheckReport) -> set[str]:
    return {tag for tag, _ in HtmlPage(render(report)).elements}


@settings(max_examples=60, deadline=None)
@given(values=st.lists(numbers, min_size=10, max_size=10), text=st.text(max_size=20), passed=st.booleans())
def test_whatever_a_report_holds_the_page_is_well_formed(values: list[float], text: str, passed: bool):
    report = make_report(layers=2, heads=2, prompts=1)
    engine = report.engines[0]
    layer = engine.caches[0]
    cache = layer.key.model_copy(update={"head_errors": tuple(values[:2]), "relative_error": values[2]})
    measurement = Measurement(name=text, value=values[3], at_most=values[4], at_least=values[5])
    level = LevelRecord(name="graphs", passed=passed, seconds=values[6], measurements=(measurement,))
    weights = {"key_weight": values[7], "value_gate_logit": values[8]}
    texts = {"prompt": text, "engine_text": text, "kl_divergence": values[9]}
    changed = with_first_engine(
        report,
        engine=text,
        caches=(layer.model_copy(update={"key": cache}), engine.caches[1]),
        projectors=tuple(each.model_copy(update=weights) for each in engine.projectors),
        prompts=tuple(prompt.model_copy(update=texts) for prompt in engine.prompts),
        check=engine.check.model_copy(update={"levels": (level,)}),
    )
    assert tags_of(changed) <= tags_of(make_report())
