"""A bound on a request's body: its size, whatever its headers say, and the time in which it has to arrive.

Middlewares: `OneLength` refuses what is ambiguous, and `BodyLimit` reads the body before any route does. (Starlette's
own limit answers in plain text.)
"""

import asyncio
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import ApiError
from runtime.server.request_log import refuse

BODY_TIMEOUT = 30.0
"""Seconds."""
_MAX_DISCARDED = 64 << 20
_DISCARD_TIMEOUT = 5.0


class OneLength:
    """Refuses a request that says in two ways where its body ends.

    What stands in front of the server may have gone by the other one, and so take a part of this body for a request of
    somebody else's (RFC 9112, 6.1).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 400 and close the connection."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if "transfer-encoding" in headers and "content-length" in headers:
                error = ApiError(
                    HTTPStatus.BAD_REQUEST,
                    "the request has both Transfer-Encoding and Content-Length; send one of them",
                    code="ambiguous_length",
                    headers={"Connection": "close"},
                )
                return await refuse(error, scope, receive, send)
        await self._app(scope, receive, send)


class BodyLimit:
    """See the module's docstring."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        """`max_body` is in bytes."""
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body and pass it on, or answer 413 or 408."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                body = await self._read(Headers(scope=scope), receive)
        except TimeoutError:
            late = f"the body did not arrive within {BODY_TIMEOUT:g} s"
            error = ApiError(HTTPStatus.REQUEST_TIMEOUT, late, code="body_timeout", headers={"Connection": "close"})
            return await refuse(error, scope, receive, send)
        except ApiError as error:
            return await refuse(error, scope, receive, send)
        if body is None:
            return None  # the client left; nobody is there to be answered
        first: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_again() -> Message:
            nonlocal first
            if first is None:
                return await receive()
            message, first = first, None
            return message

        await self._app(scope, receive_again, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None if the client left. Raises an `ApiError` for one that is too large."""
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body:
            # A client that asks first sends nothing; others would not read an answer before they have sent it all.
            if headers.get("expect", "").lower() != "100-continue":
                await _discard(receive)
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body:
                await _discard(receive)
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is too large; this server takes at most {self._max_body} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )


async def _discard(receive: Receive) -> None:
    """Read what is left of a body, within limits."""
    num_discarded = 0
    try:
        async with asyncio.timeout(_DISCARD_TIMEOUT):
            while num_discarded < _MAX_DISCARDED:
                message = await receive()
                num_discarded += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
