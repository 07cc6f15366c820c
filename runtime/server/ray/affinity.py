"""Which conversation a request belongs to, so that all of one go to the replica that holds its rows.

In: a request, and the header `X-Session-Id` of the HTTP request that it came with. Out: a key, equal for all turns of a
conversation. Only speed depends on it: any replica answers any request. Not covered: from a key to a replica, which is
Ray Serve's `ConsistentHashRouter`.
"""

import hashlib
import json
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.conversation import is_ids
from runtime.messages import Message
from runtime.request import Request

SESSION_HEADER = "x-session-id"
_FIRST_IDS = 64
"""So many ids of a prompt of ids stand for its conversation, and as many times 4 characters of a text."""

_session_id: ContextVar[str] = ContextVar("session_id", default="")


class SessionIdMiddleware:
    """Keeps the header `X-Session-Id` of a request for `affinity_key`, wherever in its handling that is asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            _session_id.set(headers.get(SESSION_HEADER, ""))
        await self._app(scope, receive, send)


def affinity_key(request: Request) -> str:
    """The key of a request's conversation: its session id, else who asks and how the prompt begins.

    A chat begins with its messages up to the first of the user's, which stay when turns are added. Who asks alone would
    send everything that comes with one API key to one replica.
    """
    if session_id := _session_id.get():
        return f"session {session_id}"
    beginning = json.dumps([request.client, *_beginning(request.prompt)])
    return f"prompt {hashlib.sha256(beginning.encode()).hexdigest()}"


def _beginning(prompt: Any) -> list[Any]:
    if isinstance(prompt, str):
        return ["user", prompt[: 4 * _FIRST_IDS]]
    if is_ids(prompt):
        return [int(token_id) for token_id in prompt[:_FIRST_IDS]]
    parts = []
    for message in prompt:
        role, content = _role_and_content(message)
        parts += [role, content]
        if role == "user":
            break
    return parts


def _role_and_content(message: Any) -> tuple[str, str]:
    if isinstance(message, Message):
        return message.role, message.content
    if isinstance(message, Mapping):
        return str(message.get("role")), str(message.get("content"))
    return "", str(message)
