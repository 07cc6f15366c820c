"""Heatmaps of cache errors: one column a layer, one row a key or value (head), a logarithmic scale of colours.

Out: the largest error by head, and the relative error. A number that is none or infinite is crossed, an exact zero
dotted, and a cell that a divergence names is ringed, so that none of these hangs on colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from c2c_export.check.html.log_colours import LogColours
from c2c_export.check.html.numbers import exact, short
from c2c_export.check.html.svg import Element, figure, label, shape
from c2c_export.check.report import CacheError, EngineReport, LayerCaches
from c2c_export.check_record import Kind

_KINDS: tuple[Kind, ...] = ("key", "value")
_PLOT_WIDTH, _CELL_HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = 900.0, 18.0, 96.0, 4.0, 36.0, 8.0
_NARROWEST, _WIDEST = 14.0, 30.0
_DIGIT_WIDTH = 6.4


@dataclass(frozen=True)
class Heatmap:
    """A drawn heatmap, and what its colours mean."""

    image: Markup
    legend: Sequence[tuple[str, Markup, str]]
    """Name of the class, a swatch of it, and its range of numbers."""
    summary: str
    """The largest number and where it is, in one sentence."""


@dataclass(frozen=True)
class _Row:
    kind: Kind
    head: int | None
    values: Sequence[float | None]
    """By column; None where a layer has no such head."""

    @property
    def name(self) -> str:
        return self.kind if self.head is None else f"{self.kind} head {self.head}"


def draw_head_errors(engine: EngineReport) -> Heatmap:
    """The largest absolute error by layer and head. Expects at least one layer."""
    rows = [
        _Row(kind, head, [_head_error(_cache(layer, kind), head) for layer in engine.caches])
        for kind in _KINDS
        for head in range(max(len(_cache(layer, kind).head_errors) for layer in engine.caches))
    ]
    return _draw(engine, rows, "Largest absolute error by layer and head")


def draw_relative_errors(engine: EngineReport) -> Heatmap:
    """The relative error by layer. Expects at least one layer."""
    rows = [_Row(kind, None, [_cache(layer, kind).relative_error for layer in engine.caches]) for kind in _KINDS]
    return _draw(engine, rows, "Relative error by layer")


def _draw(engine: EngineReport, rows: Sequence[_Row], what: str) -> Heatmap:
    layers = [caches.layer for caches in engine.caches]
    colours = LogColours.spanning(value for row in rows for value in row.values if value is not None)
    width = min(max(_PLOT_WIDTH / len(layers), _NARROWEST), _WIDEST)
    summary = f"{what}: {_largest(rows, layers)}"
    ringed = _diverging(engine)
    cells, rings, names, found = [], [], [], set()
    y = _TOP
    for number, row in enumerate(rows):
        y += _GAP if number and rows[number - 1].kind != row.kind else 0
        names.append(label(row.name, _LEFT - 8, y + 13, "end"))
        for column, value in enumerate(row.values):
            if value is None:
                continue
            x, css_class = _LEFT + column * width, colours.css_class(value)
            found.add(css_class)
            title = f"layer {layers[column]}, {row.name}: {exact(value) if math.isfinite(value) else short(value)}"
            cells.append(_cell(x, y, width, _CELL_HEIGHT, css_class, title))
            if ringed & {(layers[column], row.kind, head) for head in (None, row.head)}:
                ring = {"x": x + 1, "y": y + 1, "width": width - 2, "height": _CELL_HEIGHT - 2}
                rings += [shape("rect", {"class": css, **ring}) for css in ("ring-ground", "ring")]
        y += _CELL_HEIGHT
    numbers = _layer_numbers(layers, width, y + 14)
    axis = label("receiver layer", _LEFT, y + 30, "axis")
    size = (_LEFT + width * len(layers) + 4, y + _BOTTOM)
    image = figure(*size, summary, [*names, *cells, *rings, *numbers, axis])
    return Heatmap(image, _legend(colours, found, bool(rings)), summary)


def _cache(layer: LayerCaches, kind: Kind) -> CacheError:
    return layer.key if kind == "key" else layer.value


def _head_error(cache: CacheError, head: int) -> float | None:
    return cache.head_errors[head] if head < len(cache.head_errors) else None


def _diverging(engine: EngineReport) -> set[tuple[int, Kind, int | None]]:
    """Layer, kind and head of the divergences of the level that these numbers come from."""
    return {
        (divergence.layer, divergence.kind, divergence.head)
        for level in engine.check.levels
        if level.name == "caches"
        for divergence in level.divergences
        if divergence.layer is not None and divergence.kind is not None
    }


def _largest(rows: Sequence[_Row], layers: Sequence[int]) -> str:
    places = [
        (value, f"{row.name} in layer {layer}")
        for row in rows
        for layer, value in zip(layers, row.values, strict=True)
        if value is not None
    ]
    without_number = [where for value, where in places if not math.isfinite(value)]
    finite = [place for place in places if math.isfinite(place[0])]
    text = f"{len(without_number)} not finite, the first in {without_number[0]}; " if without_number else ""
    if not finite:
        return f"{text}no other numbers." if text else "no numbers."
    value, where = max(finite, key=lambda place: place[0])
    return f"{text}the largest is {short(value)}, {where}."


def _cell(x: float, y: float, width: float, height: float, css_class: str, title: str | None) -> Element:
    group = shape("g", {}, title)
    group.append(shape("rect", {"class": f"cell {css_class}", "x": x, "y": y, "width": width, "height": height}))
    if css_class == "zero":
        group.append(shape("circle", {"class": "dot", "cx": x + width / 2, "cy": y + height / 2, "r": 1.5}))
    elif css_class == "unbounded":
        inner, down = width - 6, height - 6
        cross = f"M{x + 3:g} {y + 3:g}l{inner:g} {down:g}m0 {-down:g}l{-inner:g} {down:g}"
        group.append(shape("path", {"class": "crossed", "d": cross}))
    return group


def _layer_numbers(layers: Sequence[int], width: float, y: float) -> list[Element]:
    # As many as find room beside each other.
    every = math.ceil((_DIGIT_WIDTH * max(len(str(layer)) for layer in layers) + 3) / width)
    return [
        label(str(layer), _LEFT + (column + 0.5) * width, y, "layer")
        for column, layer in enumerate(layers)
        if column % every == 0
    ]


def _legend(colours: LogColours, found: set[str], has_rings: bool) -> list[tuple[str, Markup, str]]:
    entries = [("zero", "exactly 0")] if "zero" in found else []
    entries += colours.legend()
    if "unbounded" in found:
        entries.append(("unbounded", "not a number, or infinite"))
    legend = [(name, _swatch(name), text) for name, text in entries]
    if has_rings:
        legend.append(("ring", _swatch("ring"), "where this level first diverged"))
    return legend


def _swatch(css_class: str) -> Markup:
    return figure(18, 18, None, [_cell(1, 1, 16, 16, css_class, None)])
