"""The page at `/`: files of the folder `page`, each at a path of its own, with headers that keep it to this server."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

PAGE = Path(__file__).with_name("page")
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The system's own table may say something else."""
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page's files as they are now."""
    for file in sorted(PAGE.iterdir()):
        if file.suffix in _TYPES:
            path = "/" if file.name == _INDEX else f"/{file.name}"
            _add_file(app, path, file.read_bytes(), _TYPES[file.suffix])


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    async def get_file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    app.add_api_route(path, get_file, methods=["GET", "HEAD"], include_in_schema=False)
