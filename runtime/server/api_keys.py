"""API keys: who may ask, and whose request it is.

A key is looked for twice: from the headers, before a body is read for somebody who may not ask (`KeysBeforeBodies`),
and by the routes themselves (`ApiKeys.dependency`), whose word is the last and which stand in the OpenAPI document.
"""

import hashlib
import hmac
from http import HTTPStatus
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.server.errors import ApiError
from runtime.server.request_log import record_of, refuse

_SCHEME = "bearer"
_bearer = HTTPBearer(auto_error=False, description="One of the server's API keys.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
_GUARDED = "/v1/"
"""What the paths that ask for a key begin with."""


class ApiKeys:
    """The keys of one server."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        """`keys` are as `ServerSettings` takes them."""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def client_of(self, key: str) -> str:
        """Whose key this is, as logs name it. Raises an `ApiError`, 401, for none or a wrong one."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        # All of them, and whole digests, so that the time taken says nothing of a key.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise ApiError(
                HTTPStatus.UNAUTHORIZED,
                "the API key is missing or wrong; send one as: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return f"key {matches.index(True)}"

    async def dependency(self, request: Request, credentials: _Credentials) -> None:
        """A dependency of routes that raises a 401 for a request without one of these keys, and notes whose it is."""
        record_of(request.scope).client = self.client_of("" if credentials is None else credentials.credentials)


class KeysBeforeBodies:
    """A middleware that refuses, from its headers alone, what comes without a key to a path that asks for one."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and _path_of(scope).startswith(_GUARDED):
            headers = Headers(scope=scope)
            scheme, key = get_authorization_scheme_param(headers.get("authorization"))
            try:
                self._keys.client_of(key if scheme.lower() == _SCHEME else "")
            except ApiError as error:
                if "expect" in headers:
                    # The body may not come at all now, so that nobody could tell where the next request begins.
                    error.headers["Connection"] = "close"
                return await refuse(error, scope, receive, send)
        await self._app(scope, receive, send)


def _path_of(scope: Scope) -> str:
    """The path within the application, which a host may have mounted below another one."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))
