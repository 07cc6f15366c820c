"""One line of log for each HTTP request, its id, and the answer to what no handler expected.

In: what the handlers note of a request in its `RequestRecord`. Out: a line with model, tokens, times and status; what
was asked and answered only where the settings say so. A middleware, the outermost one.
"""

import logging
import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.generation import Generation
from runtime.request import new_request_id
from runtime.server.errors import CLIENT_GONE, ApiError, as_api_error
from runtime.server.generation_parts import num_cached_tokens
from runtime.server.metrics import HttpMetrics

log = logging.getLogger("c2c_export.server")
_RECORD = "c2c_export.record"
_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET = ("/health", "/ready", "/metrics")
"""Asked for every few seconds."""


@dataclass
class RequestRecord:
    """What is known of a request when it is done. Times in seconds; None is left out of the log."""

    request_id: str
    model: str | None = None
    client: str | None = None
    """Which API key; not the key."""
    stream: bool | None = None
    choices: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reused_tokens: int | None = None
    finish_reasons: list[str] | None = None
    timings: dict[str, float] | None = None
    """Of the first answer."""
    error: str | None = None
    """The error's code, or its type."""
    param: str | None = None
    gone: bool = False
    """Whether the client left before the answer was complete."""
    prompts: list[Any] | None = None
    answers: list[str] | None = None

    def done(self, generations: Sequence[Generation], num_answers: int, with_text: bool) -> None:
        """Note the answers to prompts with `num_answers` each; `with_text` also what they say."""
        self.choices = len(generations)
        self.prompt_tokens = sum(generation.num_prompt_tokens for generation in generations[::num_answers])
        self.reused_tokens = num_cached_tokens(generations, num_answers)
        self.completion_tokens = sum(len(generation.token_ids) for generation in generations)
        self.finish_reasons = [generation.finish_reason for generation in generations]
        self.timings = {name: round(spent, 6) for name, spent in asdict(generations[0].timings).items()}
        if with_text:
            self.answers = [generation.text for generation in generations]

    def failed(self, error: ApiError) -> None:
        """Note an error; its message may quote the prompt, and is left out."""
        self.error = error.code or error.body.type
        self.param = error.body.param


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that has this scope."""
    record: RequestRecord = scope[_RECORD]
    return record


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with what a middleware has against it, and note that."""
    record_of(scope).failed(error)
    await error.response()(scope, receive, send)


class RequestLog:
    """See the module's docstring."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, routes: Sequence[BaseRoute]) -> None:
        """`routes` tell where a request would have gone that a middleware refused."""
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log it when it is answered."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        record = RequestRecord(given if _ID.fullmatch(given) else new_request_id())
        scope[_RECORD] = record
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log_failure(record, error)
            record.error = "internal_error"
            # An answer that has begun is left incomplete, and the server closes the connection.
            if not status:
                await as_api_error(error).response()(scope, receive, send_with_id)
        finally:
            spent = time.perf_counter() - started
            # No status at all: the client left before its request was complete.
            seen = CLIENT_GONE if record.gone or not status else status
            self._metrics.answered(self._path_of(scope), seen, spent)
            self._log(scope, record, seen, spent)

    def _path_of(self, scope: Scope) -> str:
        """The path of the request's route, "unknown" where it has none of ours."""
        route = scope.get("route")
        if route is None:
            route = next((route for route in self._routes if route.matches(scope)[0] is not Match.NONE), None)
        return getattr(route, "path", "unknown")

    def _log(self, scope: Scope, record: RequestRecord, status: int, spent: float) -> None:
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        known = {name: value for name, value in vars(record).items() if value is not None and name != "gone"}
        where = {"method": scope["method"], "path": scope["path"]}
        fields = {**known, **where, "status": status, "seconds": round(spent, 6)}
        log.log(level, "request", extra={"fields": fields})


def log_failure(record: RequestRecord, error: Exception) -> None:
    """Where it happened; not its message, which may quote the prompt."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    fields = {"request_id": record.request_id, "exception": type(error).__name__, "frames": frames}
    log.error("unexpected failure", extra={"fields": fields})
