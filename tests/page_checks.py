"""What anyone can ask of a page in a browser: contrast, names of controls, room; each as a list of what is wrong."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Page

_SCRIPTS = Path(__file__).parent
_CONTRASTS = (_SCRIPTS / "contrasts.js").read_text()
_STRUCTURE = (_SCRIPTS / "structure.js").read_text()
_CONTROLS = {"button", "textbox", "switch", "checkbox", "spinbutton", "link", "image", "region", "table"}
"""Roles that need a name, as Chromium calls them."""


def low_contrasts(page: Page) -> list[str]:
    """What is seen of text with less than 4.5:1, and of edges, bars and gates with less than 3:1 (WCAG 2.2, AA)."""
    measured: list[dict[str, Any]] = page.evaluate(_CONTRASTS)
    assert len(measured) > 20, "nothing was measured"
    return [f"{each['what']}: {each['ratio']:.2f}" for each in measured if each["ratio"] < each["least"]]


def structure_faults(page: Page) -> list[str]:
    """Duplicate ids, references to nothing, skipped headings, a missing language or title, and unnamed controls."""
    faults: list[str] = page.evaluate(_STRUCTURE)
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in _CONTROLS]
    assert len(seen) > 5, "no controls were seen"
    faults += [f"a {node['role']['value']} has no name" for node in seen if not node.get("name", {}).get("value")]
    session.detach()
    return faults


def overflow(page: Page) -> int:
    """By how many pixels the page is wider than its window."""
    width: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return width


def clipped_controls(page: Page) -> list[str]:
    """Buttons, fields and switches that lie outside the window's width, or are too small to touch (24 px, WCAG 2.2)."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, summary")]
            .filter((each) => each.checkVisibility())
            .filter((each) => {
                const box = (each.closest("label") ?? each).getBoundingClientRect();
                return box.left < 0 || box.right > innerWidth || box.width < 24 || box.height < 24;
            })
            .map((each) => each.id || each.textContent)"""
    )
    return found
