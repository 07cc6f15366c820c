"""Show text as it is: what has no shape of its own, or would change the page around it, gets one.

Out: `readable`, for names and running text, and `visible_token`, for single tokens, where every space counts.
"""

import unicodedata

from markupsafe import Markup, escape

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn text around and, left open, what follows too. Joiners, which scripts and emoji need, are not among them."""

_SHAPES = {" ": "·", "\n": "↵", "\r": "␍", "\t": "→"}


def readable(text: str) -> str:
    """`text` with control characters as pictures (`␀`) and what turns its direction by number (`U+202E`).

    Line breaks and tabs stay. Code points that no encoding has (half of a pair) are named by number too.
    """
    return "".join(_readable_character(character) for character in text)


def visible_token(text: str) -> Markup:
    """A token's text for the inside of `<code>`: spaces as `·`, line breaks as `↵`, tabs as `→`, each marked as such.

    Every other character without a shape stands there by number, and a combining mark over a dotted circle.
    """
    if not text:
        return Markup('<span class="unseen">empty</span>')
    combines = unicodedata.category(text[0]).startswith("M")
    return Markup("").join([Markup("◌") if combines else "", *(_visible_character(character) for character in text)])


def _visible_character(character: str) -> Markup:
    shape = _SHAPES.get(character)
    if shape is None and unicodedata.category(character) in {"Zs", "Zl", "Zp", "Cf", "Cc", "Cs", "Co", "Cn"}:
        shape = _by_number(character) if ord(character) >= 0x20 else _readable_character(character)
    return escape(character) if shape is None else Markup('<span class="unseen">{}</span>').format(shape)


def _readable_character(character: str) -> str:
    if character in "\n\t":
        return character
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    unseen = character in _DIRECTIONS or unicodedata.category(character) in {"Cc", "Cs"}
    return _by_number(character) if unseen else character


def _by_number(character: str) -> str:
    return f"U+{ord(character):04X}"
