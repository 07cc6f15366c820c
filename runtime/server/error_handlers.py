"""Who answers an error of a request: each in OpenAI's form, and noted for the log.

Not covered: what no handler expected, which `runtime.server.request_log` answers with 500.
"""

import sys
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from c2c_export.errors import C2CError
from runtime.server.errors import CLIENT_GONE, ApiError, ClientGoneError, as_api_error, validation_error
from runtime.server.request_log import record_of

_HTTP_ERRORS = {
    HTTPStatus.NOT_FOUND: ("there is no such path; /openapi.json has those that there are", "not_found"),
    HTTPStatus.METHOD_NOT_ALLOWED: ("this path does not take this method", "method_not_allowed"),
}
"""What the web framework raises, in our words."""


def add_error_handlers(app: FastAPI) -> None:
    """Let `app` answer every error in OpenAI's form."""
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(C2CError, _answer)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


def _answer(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    record_of(request.scope).failed(answer)
    return answer.response()


def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _answer(request, validation_error(error.errors()))


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, code = _HTTP_ERRORS.get(HTTPStatus(error.status_code), (str(error.detail), None))
    if error.status_code == HTTPStatus.BAD_REQUEST:
        message, code = (
            f"the body cannot be read: {_unreadable(error.__cause__)}; expected JSON in UTF-8",
            "invalid_body",
        )
    return _answer(request, ApiError(error.status_code, message, code=code, headers=error.headers))


def _unreadable(cause: BaseException | None) -> str:
    """What is wrong with a body that Python's JSON parser ended on otherwise than by finding that it is not JSON."""
    match cause:
        case UnicodeDecodeError():
            return f"it is not UTF-8 at byte {cause.start}"
        case RecursionError():
            return "it is nested too deeply"
        case ValueError():
            return f"it has a whole number of more than {sys.get_int_max_str_digits()} digits"
    return "it is not in a form that this server knows"
