"""A bar that shows how much of its tolerance a measurement used, on a logarithmic scale with the tolerance as a line.

Decoration: the table beside it says the same in numbers.
"""

import math

from markupsafe import Markup

from c2c_export.check.html.svg import figure, shape

_WIDTH, _HEIGHT = 132.0, 16.0
_LOWEST, _HIGHEST = -4.0, 2.0
"""Decimal logarithms of the shares at both ends."""


def draw_tolerance_bar(share: float, passed: bool) -> Markup:
    """The bar of `share`, see `allowance.used_share`; one that leaves the scale ends in an arrow, `nan` is crossed."""
    tolerance = _place(1.0)
    elements = [shape("rect", {"class": "track", "x": 0, "y": 4, "width": _WIDTH, "height": 8})]
    verdict = "within" if passed else "beyond"
    if math.isnan(share):
        crosses = " ".join(f"M{x} 4l8 8m0 -8l-8 8" for x in range(2, int(_WIDTH) - 8, 12))
        elements.append(shape("path", {"class": "crossed", "d": crosses}))
    else:
        elements.append(shape("rect", {"class": verdict, "x": 0, "y": 4, "width": _place(share), "height": 8}))
    if share > 10**_HIGHEST:
        elements.append(shape("path", {"class": "beyond", "d": f"M{_WIDTH - 8} 0l8 8l-8 8z"}))
    elements.append(shape("path", {"class": "tolerance", "d": f"M{tolerance:g} 0v{_HEIGHT:g}"}))
    return figure(_WIDTH, _HEIGHT, None, elements)


def _place(share: float) -> float:
    if share <= 0:
        return 0.0
    exponent = min(max(math.log10(share), _LOWEST), _HIGHEST) if math.isfinite(share) else _HIGHEST
    return _WIDTH * (exponent - _LOWEST) / (_HIGHEST - _LOWEST)
