"""Where two generated texts part."""

import unicodedata
from dataclasses import dataclass

_JOINER = "\u200d"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)


@dataclass(frozen=True)
class Parting:
    """What both texts begin with, and how each goes on; an empty rest is a text that ends there."""

    common: str
    trained_rest: str
    engine_rest: str

    @property
    def texts_are_equal(self) -> bool:
        """Whether neither goes on."""
        return not self.trained_rest and not self.engine_rest


def part(trained: str, engine: str) -> Parting:
    """Split both texts where they first differ, but inside no character that a reader sees as one.

    An accent, a joined emoji, a skin tone or a flag stays whole, so that each side shows its own.
    """
    length = 0
    while length < min(len(trained), len(engine)) and trained[length] == engine[length]:
        length += 1
    if length < max(len(trained), len(engine)):
        while length and (_continues(trained, length) or _continues(engine, length)):
            length -= 1
    return Parting(trained[:length], trained[length:], engine[length:])


def _continues(text: str, place: int) -> bool:
    # Whether text[place] belongs to what stands before it.
    if place >= len(text):
        return False
    before, character = text[place - 1], text[place]
    if ord(character) in _FLAG_LETTERS and ord(before) in _FLAG_LETTERS:
        return True
    extends = unicodedata.category(character).startswith("M") or ord(character) in _SKIN_TONES
    return extends or _JOINER in (before, character)
