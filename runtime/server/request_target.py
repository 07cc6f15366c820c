"""A request's target in absolute form, as a proxy sends it: `GET http://host/health` (RFC 9112, 3.2.2)."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_ORIGIN = re.compile(r"https?://[^/]*", re.IGNORECASE)
"""What stands before the path."""


class PathOfTarget:
    """A middleware that leaves the path of an absolute target, which every server has to take."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with nothing before its path."""
        if scope["type"] == "http" and (origin := _ORIGIN.match(scope["path"])):
            path = scope["path"][origin.end() :] or "/"
            scope = {**scope, "path": path, "raw_path": None}
        await self._app(scope, receive, send)
