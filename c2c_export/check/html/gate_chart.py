"""Gates and fuse weights of one sharer's projectors: one column a projector, in the order of the receiver's layers.

A bar is the mean weight, 0 to 1; the mark below it is the gate, a disc if open and a cross if closed. A closed gate's
bar is an outline, since its weight has no effect.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

from c2c_export.check.html.numbers import short
from c2c_export.check.html.svg import Element, figure, label, shape
from c2c_export.check.report import ProjectorDetails

_PLOT_WIDTH, _LEFT = 900.0, 112.0
_BAR_HEIGHT, _PANEL_HEIGHT, _TOP = 64.0, 104.0, 10.0
_NARROWEST, _WIDEST, _DIGIT_WIDTH = 16.0, 30.0, 6.4


def draw_gates(sharer: int, projectors: Sequence[ProjectorDetails]) -> Markup:
    """The chart of `projectors`, all of one sharer. Expects at least one."""
    numbers = [number for each in projectors for number in (each.receiver_layer, each.sharer_layer)]
    digits = max(len(str(number)) for number in numbers)
    # Every column is labelled: the layer map is read from here.
    width = max(min(max(_PLOT_WIDTH / len(projectors), _NARROWEST), _WIDEST), digits * _DIGIT_WIDTH + 3)
    right = _LEFT + width * len(projectors)
    elements = _panel("key", _TOP, right) + _panel("value", _TOP + _PANEL_HEIGHT, right)
    y = _TOP + 2 * _PANEL_HEIGHT + 6
    elements += [label("receiver layer", _LEFT - 8, y, "end"), label("from sharer layer", _LEFT - 8, y + 18, "end")]
    for column, each in enumerate(projectors):
        x = _LEFT + column * width
        group = shape("g", {}, _title(each))
        group.extend(_column(x, _TOP, width, each.key_weight, each.key_gate_open))
        group.extend(_column(x, _TOP + _PANEL_HEIGHT, width, each.value_weight, each.value_gate_open))
        group.append(label(str(each.receiver_layer), x + width / 2, y, "layer"))
        group.append(label(str(each.sharer_layer), x + width / 2, y + 18, "layer"))
        elements.append(group)
    return figure(right + 4, y + 26, describe_gates(sharer, projectors), elements)


def describe_gates(sharer: int, projectors: Sequence[ProjectorDetails]) -> str:
    """How many gates are open, and how strongly these fuse, in one sentence."""
    keys = [each.key_weight for each in projectors if each.key_gate_open]
    values = [each.value_weight for each in projectors if each.value_gate_open]
    parts = [
        f"{len(weights)} of {len(projectors)} {name} gates are open{_mean_text(weights)}"
        for name, weights in (("key", keys), ("value", values))
    ]
    return f"Sharer {sharer}: {' and '.join(parts)}."


def _mean_text(weights: Sequence[float]) -> str:
    return f" (mean weight {short(sum(weights) / len(weights))})" if weights else ""


def _panel(name: str, y: float, right: float) -> list[Element]:
    elements = [label(f"{name} weight", 4, y + _BAR_HEIGHT / 2 + 4), label("gate", _LEFT - 8, y + 83, "end")]
    for weight in (0.0, 0.5, 1.0):
        height = y + _BAR_HEIGHT * (1 - weight)
        elements.append(shape("path", {"class": "grid", "d": f"M{_LEFT:g} {height:g}H{right:g}"}))
        elements.append(label(f"{weight:g}", _LEFT - 8, height + 4, "end"))
    return elements


def _column(x: float, y: float, width: float, weight: float, is_open: bool) -> list[Element]:
    state = "open" if is_open else "closed"
    middle, base = x + width / 2, y + _BAR_HEIGHT
    # An area to point at, as tall as the panel, however short the bar is.
    elements = [shape("rect", {"class": "area", "x": x, "y": y, "width": width, "height": _BAR_HEIGHT + 28})]
    if math.isfinite(weight):
        height = _BAR_HEIGHT * min(max(weight, 0.0), 1.0)
        bar = {"x": x + 2, "y": base - height, "width": width - 4, "height": height}
        elements.append(shape("rect", {"class": f"weight {state}", **bar}))
    else:
        elements.append(shape("path", {"class": "crossed", "d": f"M{middle - 5:g} {base - 14:g}l10 10m0 -10l-10 10"}))
    if is_open:
        elements.append(shape("circle", {"class": "gate", "cx": middle, "cy": base + 15, "r": 4.5}))
    else:
        elements.append(shape("path", {"class": "gate", "d": f"M{middle - 4:g} {base + 11:g}l8 8m0 -8l-8 8"}))
    return elements


def _title(each: ProjectorDetails) -> str:
    gates = [
        (name, "open" if is_open else "closed", logit, weight)
        for name, is_open, logit, weight in (
            ("key", each.key_gate_open, each.key_gate_logit, each.key_weight),
            ("value", each.value_gate_open, each.value_gate_logit, each.value_weight),
        )
    ]
    lines = [f"{name}: gate {state} (logit {short(logit)}), mean weight {short(w)}" for name, state, logit, w in gates]
    head = f"receiver layer {each.receiver_layer} from sharer layer {each.sharer_layer}, projector {each.projector}"
    return "\n".join([head, *lines])
