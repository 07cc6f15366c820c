"""How far each level may be off in each precision, and why: one table.

In: a level, the name of one of its measurements, a precision. Out: a `Tolerance`. The numbers were measured on the
recorded pairs and on the demo pair (docs/check.md has what was found), and have room for other models and processors.
Not covered: what a measurement means, which its level says.
"""

from dataclasses import dataclass

from c2c_export.check_record import LevelName, Measurement


@dataclass(frozen=True)
class Tolerance:
    """One bound and its reason; without a bound the number is only told."""

    at_most: float | None
    at_least: float | None
    reason: str


@dataclass(frozen=True)
class _Row:
    """Upper bounds of one measurement by precision, or lower ones."""

    fp32: float
    fp16: float
    bf16: float
    int8: float
    int4: float
    reason: str
    is_lower_bound: bool = False


_TABLE: dict[tuple[LevelName, str], _Row] = {
    ("caches", "row error"): _Row(
        fp32=2e-3,
        fp16=0.3,
        bf16=1.5,
        int8=2.0,
        int4=6.0,
        reason="The worst row of the worst head: rounding of all layers below, and of the fuser, that met.",
    ),
    ("caches", "relative error"): _Row(
        fp32=2e-4,
        fp16=0.02,
        bf16=0.15,
        int8=0.25,
        int4=1.2,
        reason="The root mean square of a whole cache, where single rows average out.",
    ),
    ("logits", "relative error"): _Row(
        fp32=2e-3,
        fp16=0.1,
        bf16=0.6,
        int8=0.8,
        int4=6.0,
        reason="The largest error of a logit by the spread of the logits.",
    ),
    ("logits", "KL divergence"): _Row(
        fp32=1e-5,
        fp16=1e-3,
        bf16=0.1,
        int8=0.1,
        int4=3.0,
        reason="What the precision may cost in probability, in nats, at the worst prompt.",
    ),
    ("generation", "unexplained gap"): _Row(
        fp32=2e-3,
        fp16=0.1,
        bf16=0.6,
        int8=0.8,
        int4=6.0,
        reason="Where the texts part, the engine's token may be as much behind as twice the logits' error explains.",
    ),
}


def tolerance(level: LevelName, measurement: str, precision: str) -> Tolerance:
    """The bound of a measurement. A measurement that has no row in the table is only told."""
    row = _TABLE.get((level, measurement))
    if row is None:
        return Tolerance(None, None, "only told")
    bound = float(getattr(row, precision))
    return Tolerance(None if row.is_lower_bound else bound, bound if row.is_lower_bound else None, row.reason)


def measured(level: LevelName, measurement: str, precision: str, value: float) -> Measurement:
    """A measurement of `value` with its bound."""
    bound = tolerance(level, measurement, precision)
    return Measurement(name=measurement, value=value, at_most=bound.at_most, at_least=bound.at_least)
