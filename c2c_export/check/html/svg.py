"""SVG as a tree of elements, so that whatever text it holds is escaped by the writer of the tree.

Colours come from classes of the page's style. No element refers to another (`url(#…)`), so figures cannot collide.
"""

from collections.abc import Iterable, Mapping
from xml.etree import ElementTree

from markupsafe import Markup

from c2c_export.check.html.visible_text import readable

Element = ElementTree.Element


def shape(tag: str, attributes: Mapping[str, str | float], title: str | None = None) -> Element:
    """An element such as `rect`; `title` is what a pointer over it shows."""
    element = Element(tag, {name: _attribute(value) for name, value in attributes.items()})
    if title is not None:
        ElementTree.SubElement(element, "title").text = readable(title)
    return element


def label(text: str, x: float, y: float, css_class: str = "") -> Element:
    """Text whose baseline begins at `x`, `y`, unless the class says otherwise."""
    element = shape("text", {"x": x, "y": y} | ({"class": css_class} if css_class else {}))
    element.text = readable(text)
    return element


def figure(width: float, height: float, description: str | None, elements: Iterable[Element]) -> Markup:
    """The whole image, in its own size in CSS pixels.

    `description` is what a screen reader says in its place; without one it is decoration, beside text that says it all.
    """
    spoken = {"aria-hidden": "true"} if description is None else {"role": "img", "aria-label": readable(description)}
    view_box = f"0 0 {_attribute(width)} {_attribute(height)}"
    image = shape("svg", {"width": width, "height": height, "viewBox": view_box, **spoken})
    image.extend(elements)
    return Markup(ElementTree.tostring(image, encoding="unicode"))


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
