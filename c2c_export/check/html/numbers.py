"""Numbers for the page: four digits to read, and the exact number as a title where digits were left out.

`nan` and infinities are valid: a check that failed may hold them.
"""

import math

from markupsafe import Markup


def short(value: float) -> str:
    """`value` with at most four significant digits, such as `0.0123`, `1.5e-7` or `not a number`."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    mantissa, has_exponent, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if has_exponent else mantissa


def exact(value: float) -> str:
    """The shortest text from which Python reads the same number again."""
    return repr(float(value))


def number(value: float) -> Markup:
    """`short(value)` for a text; its title has the exact number where that says more."""
    return _titled(short(value), value)


def percentage(share: float) -> Markup:
    """A share of 1 in per cent with one decimal, such as `87.5 %`."""
    text = f"{100 * share:.1f} %" if math.isfinite(share) else short(share)
    return _titled(text, share)


def difference_in_points(share: float, other: float) -> Markup:
    """How many percentage points `share` is above `other`, with its sign."""
    points = 100 * (share - other)
    text = f"{points:+.1f}".replace("-", "−") if math.isfinite(points) else short(points)
    return _titled(text, share - other)


def _titled(text: str, value: float) -> Markup:
    if not math.isfinite(value) or text == exact(value):
        return Markup('<span class="number">{}</span>').format(text)
    return Markup('<span class="number" title="{}">{}</span>').format(exact(value), text)
