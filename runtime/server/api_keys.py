"""API keys: who may ask, and whose request it is."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from runtime.server.errors import ApiError
from runtime.server.request_log import record_of

_bearer = HTTPBearer(auto_error=False, description="One of the server's API keys.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


def key_check(keys: tuple[str, ...]) -> Callable[..., Awaitable[None]]:
    """A dependency of routes that raises a 401 for a request without one of these keys, and notes whose it is."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def check(request: Request, credentials: _Credentials) -> None:
        given = b"" if credentials is None else credentials.credentials.encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(given).digest()
        # All of them, and whole digests, so that the time taken says nothing of a key.
        matches = [hmac.compare_digest(digest, known) for known in digests]
        if not any(matches):
            raise ApiError(
                HTTPStatus.UNAUTHORIZED,
                "the API key is missing or wrong; send one as: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        record_of(request.scope).client = f"key {matches.index(True)}"

    return check
