"""The page's files: all its own, none inline, and served under a policy that lets nothing else in."""

import re

import httpx2
import pytest
from html_page import HtmlPage
from served import Served

from runtime.server.page_files import PAGE

pytestmark = pytest.mark.xdist_group("two_sharers_parallel")

SCRIPTS = sorted(PAGE.glob("*.js"))
PARSING = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|url\(")
MAX_BYTES = 64 * 1024


def test_the_page_links_nothing_from_elsewhere_and_has_nothing_inline() -> None:
    page = HtmlPage((PAGE / "index.html").read_text())
    names = {name for name, _ in page.elements}
    assert names.isdisjoint({"style", "iframe", "object", "embed", "base"})
    for name, attributes in page.elements:
        assert not [each for each in attributes if each == "style" or each.startswith("on")]
        for link in (attributes.get("href"), attributes.get("src")):
            assert link is None or link.startswith("#") or (PAGE / link).is_file(), f"{name} links {link}"
    assert page.texts_of("script") == []


def test_stylesheet_and_scripts_name_no_other_origin_and_never_parse_html() -> None:
    for file in [*SCRIPTS, PAGE / "page.css"]:
        text = file.read_text()
        assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= {"http://www.w3.org/2000/svg"}, file.name
        assert not PARSING.search(text), file.name


def test_every_script_says_what_it_is_for() -> None:
    assert SCRIPTS
    for file in SCRIPTS:
        assert file.read_text().startswith("/**\n * "), file.name


def test_the_page_is_small() -> None:
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < MAX_BYTES


def test_every_file_is_served_under_a_policy_that_lets_nothing_else_in(server: Served) -> None:
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    with httpx2.Client(base_url=server.url) as client:
        for file in sorted(PAGE.iterdir()):
            answer = client.get("/" if file.name == "index.html" else f"/{file.name}")
            assert answer.content == file.read_bytes()
            assert answer.headers["content-type"].startswith(types[file.suffix])
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy or "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
