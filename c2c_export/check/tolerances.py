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
    """Upper bounds of one measurement by precision, or lower ones; None where the number is only told."""

    fp32: float | None
    fp16: float | None
    bf16: float | None
    int8: float | None
    int4: float | None
    reason: str
    is_lower_bound: bool = False


_TABLE: dict[tuple[LevelName, str], _Row] = {
    ("sources", "differences"): _Row(
        fp32=0,
        fp16=0,
        bf16=0,
        int8=0,
        int4=0,
        reason="A bundle is made of its sources without rounding, whatever its engines' precision.",
    ),
    ("weights", "wrong parameters"): _Row(
        fp32=0,
        fp16=0,
        bf16=0,
        int8=0,
        int4=0,
        reason="Each is compared within what its own format rounds away: c2c_export.check.graph.rounding derives it.",
    ),
    ("weights", "wrong constants and connections"): _Row(
        fp32=0,
        fp16=0,
        bf16=0,
        int8=0,
        int4=0,
        reason="They are kept in float32, or are no numbers at all.",
    ),
    ("graphs", "caches"): _Row(
        fp32=1e-2,
        fp16=0.05,
        bf16=0.3,
        int8=1e-2,
        int4=1e-2,
        reason="The worst row, over the same weights and rows: sums in another order; 3e-4 in the demo pair's "
        "receiver, 2.1e-3 in Gemma 3's upper layers, the sharer's.",
    ),
    ("graphs", "logits"): _Row(
        fp32=5e-3,
        fp16=0.05,
        bf16=0.3,
        int8=5e-3,
        int4=5e-3,
        reason="As caches, and the last layer's attention, MLP and head: 4e-4 in the demo pair.",
    ),
    ("graphs", "caches, activations in 8 bits"): _Row(
        fp32=None,
        fp16=None,
        bf16=None,
        int8=0.5,
        int4=0.5,
        reason="Activations are rounded in every product: 0.14 in the demo pair in int4, 0.2 in small ones.",
    ),
    ("graphs", "logits, activations in 8 bits"): _Row(
        fp32=None,
        fp16=None,
        bf16=None,
        int8=0.5,
        int4=0.5,
        reason="As caches. Another model's rows are off by 1.4: as far as two unrelated vectors are apart.",
    ),
    ("graphs", "corrections"): _Row(
        fp32=5e-3,
        fp16=0.1,
        bf16=0.5,
        int8=5e-3,
        int4=5e-3,
        reason="Of what is added to the worst row: 3.3e-4 in the demo pair, where a weight is nearly 0.",
    ),
    ("caches", "row error"): _Row(
        fp32=5e-4,
        fp16=0.2,
        bf16=0.9,
        int8=2.0,
        int4=8.0,
        reason="The worst row of the worst head, of random models, which spread rounding most: 2e-5 in fp32, 0.53 in "
        "int8, 2.9 in int4. Above 1.4, what a row of another token would be off by, int4 proves nothing here.",
    ),
    ("caches", "relative error"): _Row(
        fp32=1e-4,
        fp16=0.02,
        bf16=0.15,
        int8=0.3,
        int4=1.3,
        reason="A whole cache, in which single rows average out: 3e-6 in fp32, 0.1 in int8, 0.74 in int4. Unrelated "
        "caches are off by 1.4.",
    ),
    ("caches", "row error, own weights"): _Row(
        fp32=None,
        fp16=None,
        bf16=None,
        int8=0.5,
        int4=0.5,
        reason="As `graphs`, activations in 8 bits: 0.21 over a whole prefill. Another token's row is off by 1.4.",
    ),
    ("caches", "relative error, own weights"): _Row(
        fp32=None,
        fp16=None,
        bf16=None,
        int8=0.15,
        int4=0.15,
        reason="Rows average out: 0.046. Fused in parallel instead of sequentially it is 0.5, without a cache 1.",
    ),
    ("logits", "relative error"): _Row(
        fp32=5e-4,
        fp16=0.2,
        bf16=1.5,
        int8=3.0,
        int4=12.0,
        reason="The largest of all logits, and of random models: 2e-5 in fp32, 1.1 in int8, 5.1 in int4.",
    ),
    ("logits", "relative error, own weights"): _Row(
        fp32=None,
        fp16=None,
        bf16=None,
        int8=0.8,
        int4=0.8,
        reason="Activations in 8 bits, the largest of all logits: 0.35. Another prompt's logits are off by 1.4.",
    ),
    ("logits", "KL divergence"): _Row(
        fp32=1e-6,
        fp16=1e-2,
        bf16=0.2,
        int8=0.6,
        int4=8.0,
        reason="What a prompt's answers may change, in nats, at worst: 7e-11 in fp32, 0.16 in int8, 2.9 in int4.",
    ),
    ("logits", "top-1 agreement"): _Row(
        fp32=1.0,
        fp16=None,
        bf16=None,
        int8=None,
        int4=None,
        reason="Float32 changes no choice but between equals; other precisions do where tokens are nearly as likely.",
        is_lower_bound=True,
    ),
    ("logits", "top-5 agreement"): _Row(
        fp32=1.0, fp16=None, bf16=None, int8=None, int4=None, reason="As for the likeliest token.", is_lower_bound=True
    ),
    ("generation", "gap at the first difference"): _Row(
        fp32=1e-3,
        fp16=0.4,
        bf16=3.0,
        int8=6.0,
        int4=24.0,
        reason="Twice the logits' error: two logits that change places have moved by that at most.",
    ),
    ("generation", "gap of any token, own weights"): _Row(
        fp32=None,
        fp16=None,
        bf16=None,
        int8=1.0,
        int4=1.0,
        reason="The largest error of a logit, and a little of another's: 0.33. Unrelated tokens are 3 apart.",
    ),
    ("questions", "gap of another answer"): _Row(
        fp32=1e-2,
        fp16=0.5,
        bf16=2.0,
        int8=4.0,
        int4=16.0,
        reason="In nats. A choice of some tokens adds up their errors; float32 changes none but between equals.",
    ),
}


def tolerance(level: LevelName, measurement: str, precision: str) -> Tolerance:
    """The bound of a measurement. A measurement that has no row in the table is only told."""
    row = _TABLE.get((level, measurement))
    if row is None:
        return Tolerance(None, None, "only told")
    bound: float | None = getattr(row, precision)
    if bound is None:
        return Tolerance(None, None, row.reason)
    return Tolerance(None if row.is_lower_bound else bound, bound if row.is_lower_bound else None, row.reason)


def measured(level: LevelName, measurement: str, precision: str, value: float) -> Measurement:
    """A measurement of `value` with its bound."""
    bound = tolerance(level, measurement, precision)
    return Measurement(name=measurement, value=value, at_most=bound.at_most, at_least=bound.at_least)
