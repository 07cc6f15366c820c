"""How much of its tolerance a measurement used: 1 is all of it, whichever way the tolerance points."""

import math

from c2c_export.check.html.numbers import short
from c2c_export.check_record import Measurement


def used_share(measurement: Measurement) -> float | None:
    """Value over tolerance; for a lower bound on a share, the disagreement over the one that is allowed.

    0.05 of an allowed 0.1 is 0.5, and so is an agreement of 95 % where 90 % are asked for; a lower bound above 1, a
    count, gives bound over value. The larger one where there are two bounds, `nan` for a value that is none, None
    without a bound.
    """
    value, shares = measurement.value, []
    if measurement.at_most is not None:
        shares.append(_ratio(value, measurement.at_most))
    if measurement.at_least is not None:
        if measurement.at_least <= 1:
            shares.append(_ratio(1 - value, 1 - measurement.at_least))
        else:
            shares.append(_ratio(measurement.at_least, value))
    if math.isnan(value):
        return math.nan
    return max(shares, default=None)


def describe_share(share: float) -> str:
    """`share` in words: `12 %` of the tolerance, or `34 times` the tolerance."""
    if math.isnan(share):
        return "not a number"
    if share > 1:
        return f"{short(float(f'{share:.2g}'))} times"
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 1 or percent == 0 else "below 1 %"


def tolerance_text(measurement: Measurement) -> str:
    """What the value had to be, such as `≤ 0.01`; empty where there is no bound."""
    bounds = [("≤", measurement.at_most), ("≥", measurement.at_least)]
    return " and ".join(f"{sign} {short(bound)}" for sign, bound in bounds if bound is not None)


def _ratio(value: float, allowed: float) -> float:
    if value <= 0:
        return 0.0
    if value == allowed:
        return 1.0
    # Nothing is allowed, so that any value is infinitely too much.
    return value / allowed if allowed > 0 else math.inf
