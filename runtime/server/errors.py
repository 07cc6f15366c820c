"""Every error of the server in the form of OpenAI's API: {"error": {"message", "type", "param", "code"}}.

In: what the engine raised, or what pydantic found. Out: an `ApiError`, which has a response with the right status. Not
covered: who catches what (`runtime.server.error_handlers`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.responses import Response
from pydantic import BaseModel

from c2c_export.errors import AnswerTooLongError, C2CError, PromptError, PromptTooLongError, UsageError
from runtime.request import AbortedError, ClosedError, DeadlineError, QueueFullError

CLIENT_GONE = 499
"""The status that logs and metrics have for a client that left; nobody receives it."""
RETRY_WHEN_CLOSING = 5
"""Seconds after which a client may look for another server."""
_MAX_FOUND = 60
_TYPES: dict[int, str] = {HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error", HTTPStatus.REQUEST_TIMEOUT: "timeout_error"}
_FIELD = re.compile(r"([a-z][a-z_0-9]*): ")
_CODES = {
    "unserved": "unsupported_parameter",
    "unknown": "unknown_parameter",
    "missing": "missing_required_parameter",
}


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    """invalid_request_error, rate_limit_error, timeout_error or server_error."""
    param: str | None = None
    """The field of the request that was wrong."""
    code: str | None = None


class ErrorResponse(BaseModel):
    """An error."""

    error: ErrorBody


class ApiError(Exception):
    """An error as a client sees it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        self.body = ErrorBody(
            message=_encodable(message), type=_type_of(status), param=param and _encodable(param), code=code
        )

    def json(self) -> str:
        """The response's body."""
        return ErrorResponse(error=self.body).model_dump_json()

    def response(self) -> Response:
        """The response."""
        return Response(self.json(), self.status, self.headers, media_type="application/json")


class ClientGoneError(Exception):
    """The client closed its connection before the answer was complete."""


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error that the client can mend."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def closing(message: str = "the server is shutting down and takes no more requests") -> ApiError:
    """What a server that is shutting down answers."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        code="shutting_down",
        headers={"Retry-After": str(RETRY_WHEN_CLOSING)},
    )


def engine_failed() -> ApiError:
    """What a server answers whose engine failed for good, until its process is started anew."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "the engine failed and takes no more requests until the server is started anew; its log says why",
        code="engine_failed",
        headers={"Retry-After": str(RETRY_WHEN_CLOSING)},
    )


def as_api_error(error: Exception, prompt_field: str | None = None, tokens_field: str = "max_tokens") -> ApiError:
    """What a client sees of an engine's error; the fields are those that held the prompt and the tokens wanted."""
    message = str(error).replace("max_new_tokens", tokens_field)
    match error:
        case ApiError():
            return error
        case AnswerTooLongError():
            return invalid_request(message, tokens_field, "context_length_exceeded")
        case PromptTooLongError():
            return invalid_request(message, prompt_field, "context_length_exceeded")
        case PromptError():
            return invalid_request(message, prompt_field)
        case UsageError():
            # Options' errors begin with the field's name.
            field = _FIELD.match(message)
            return invalid_request(message, field[1] if field else prompt_field)
        case QueueFullError():
            wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code="queue_full", headers=wait)
        case DeadlineError():
            return ApiError(HTTPStatus.REQUEST_TIMEOUT, message, code="deadline_exceeded")
        case ClosedError():
            # Of an engine that had it already: what comes later is refused before it gets there.
            return closing("the server is shutting down, and ended this request before its answer was complete")
        case AbortedError():
            return ApiError(CLIENT_GONE, message, code="aborted")
        case C2CError():
            return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="engine_failed")
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says why", code="internal_error")


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors as a client sees it."""
    first = errors[0]
    kind, where, found = first["type"], _name_of(first["loc"]), first.get("input")
    if kind == "json_invalid":
        what = first.get("ctx", {}).get("error", "")
        return invalid_request(f"the body is not valid JSON: {what} at character {first['loc'][-1]}")
    if kind in ("unserved", "unknown", "disagreement"):
        name = first["ctx"]["param"]
        param = f"{where}.{name}" if where else name
        return invalid_request(f"{param}: {first['msg']}", param, _CODES.get(kind))
    if not where:
        if kind == "missing":
            return invalid_request("the body is empty; expected a JSON object")
        if kind in ("model_attributes_type", "model_type", "dict_type"):
            hint = "; send it with Content-Type: application/json" if isinstance(found, bytes) else ""
            return invalid_request(f"the body is no JSON object; expected one{hint}")
        return invalid_request(first["msg"])
    if kind == "missing":
        return invalid_request(f"{where} is missing", where, _CODES[kind])
    shown = f"{_shown(found)} is not allowed; " if isinstance(found, str | int | float | bool | None) else ""
    message = first["msg"][0].lower() + first["msg"][1:]
    return invalid_request(f"{where}: {shown}{message}", where)


def _shown(found: object) -> str:
    text = "null" if found is None else repr(found) if isinstance(found, str) else str(found)[: _MAX_FOUND + 1]
    return text if len(text) <= _MAX_FOUND else text[:_MAX_FOUND] + "…"


def _name_of(location: Sequence[str | int]) -> str:
    """As OpenAI writes it: messages[0].content. Parts in angle brackets name a union's alternative."""
    name = ""
    for part in location:
        if part in ("body", "path", "query") and not name:
            continue
        if isinstance(part, int):
            name += f"[{part}]"
        elif not part.startswith("<"):
            name += f".{part}" if name else part
    return name


def _encodable(text: str) -> str:
    """`text` without the lone surrogates that a client may have sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def _type_of(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of these error statuses, and that any other client error looks the same."""
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": HTTPStatus(status).phrase} for status in statuses
    }
    return described | {"4XX": {"model": ErrorResponse, "description": "Any other error of the request"}}
