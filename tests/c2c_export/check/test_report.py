"""A report as JSON is read again as what it was, numbers that are none included."""

import json
import math

from check_reports import make_report

from c2c_export.check.report import CheckReport
from c2c_export.check_record import CheckRecord, LevelRecord, Measurement


def test_a_report_comes_back_from_json_as_it_was():
    report = make_report()
    assert CheckReport.model_validate_json(report.model_dump_json(indent=1)) == report


def test_numbers_that_are_none_come_back_from_json():
    values = (math.nan, math.inf, -math.inf)
    measurements = tuple(
        Measurement(name=str(value), value=value, at_most=math.inf, at_least=-math.inf) for value in values
    )
    level = LevelRecord(name="caches", passed=False, seconds=0.0, measurements=measurements)
    check = make_report().engines[0].check.model_copy(update={"levels": (level,)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = check.model_dump_json()
    written = json.loads(text, parse_constant=refuse)["levels"][0]["measurements"]
    assert [measurement["value"] for measurement in written] == ["NaN", "Infinity", "-Infinity"]
    read = CheckRecord.model_validate_json(text).levels[0].measurements
    assert math.isnan(read[0].value)
    assert [measurement.value for measurement in read[1:]] == [math.inf, -math.inf]
    assert {(measurement.at_most, measurement.at_least) for measurement in read} == {(math.inf, -math.inf)}
    assert not read[0].passed
