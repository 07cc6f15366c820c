"""An HTML page as a browser reads it, for tests of what is on it."""

from html.parser import HTMLParser

VOID = {"meta", "br", "link", "input"}


class HtmlPage(HTMLParser):
    """What a browser sees: elements with their attributes, their text, and whether every one is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1] == tag, f"</{tag}> closes {self._open}"
        self._open.pop()
        if tag in {"td", "th"}:
            self.texts.append(("", " "))

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def text(self) -> str:
        """Everything but the style, white space folded as a browser folds it."""
        return " ".join("".join(data for tag, data in self.texts if tag != "style").split())

    def texts_of(self, tag: str) -> list[str]:
        """The texts right inside elements of that name."""
        return [data for name, data in self.texts if name == tag]

    @property
    def attributes(self) -> set[str]:
        """Every attribute's value."""
        return {value for _, found in self.elements for value in found.values() if value is not None}
