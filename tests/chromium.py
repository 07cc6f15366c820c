"""A real browser for tests of pages: Debian's Chromium, without a window, driven by Playwright.

`running_chromium` starts one, `visit` opens a page in it. Playwright's event loop runs in the thread that started it,
so close the browser before other tests of that thread run asyncio: a fixture of a module's scope does.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    # Root has no sandbox, as in most containers; pages of these tests are our own.
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str:
    """The browser's path; the test fails where there is none, as a page that was not tried is not tested."""
    named = os.environ.get("CHROMIUM")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        looked_for = f"CHROMIUM={named} is no program" if named else f"none of {', '.join(_NAMES)} is in PATH"
        pytest.fail(
            f"tests of pages need Chromium, and {looked_for}; install it (Debian: apt-get install chromium), or name "
            "the program in the environment variable CHROMIUM",
            pytrace=False,
        )
    return found


@contextmanager
def running_chromium() -> Iterator[Browser]:
    """A browser, closed at the end."""
    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, with all that it asked for and all that the browser complained of."""

    page: Page
    origin: str
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    expected_statuses: set[int] = field(default_factory=set)
    """Failed requests that are part of the test; the browser's console names each."""

    @property
    def unexpected(self) -> list[str]:
        """Complaints but for those of expected statuses."""
        expected = [f"the server responded with a status of {status} " for status in self.expected_statuses]
        return [text for text in self.complaints if not any(part in text for part in expected)]

    @property
    def foreign_requests(self) -> list[str]:
        """Requests to anyone but the page's own server."""
        return [request.url for request in self.requests if not request.url.startswith(f"{self.origin}/")]


@contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """`url` in a context of its own, as Playwright's `new_context` takes `options`.

    At the end fails for anything in the console, and for any request to another origin.
    """
    with browser.new_context(**options) as context:
        context.set_default_timeout(20_000)
        visited = Visit(context.new_page(), url)

        def complain(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                visited.complaints.append(message.text)

        visited.page.on("console", complain)
        visited.page.on("pageerror", lambda error: visited.complaints.append(str(error)))
        visited.page.on("request", lambda request: visited.requests.append(request))
        visited.page.goto(url)
        yield visited
        assert not visited.unexpected, f"the browser complained: {visited.unexpected}"
        assert not visited.foreign_requests, f"the page asked others: {visited.foreign_requests}"
