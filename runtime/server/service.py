"""What every route of one application works with."""

from dataclasses import dataclass

from fastapi import Request

from runtime.request import QueueFullError
from runtime.server.errors import closing, engine_failed
from runtime.server.generation_parts import ResponseHead
from runtime.server.metrics import HttpMetrics
from runtime.server.served_engine import ServedEngine
from runtime.server.served_models import ServedModels
from runtime.server.settings import ServerSettings

_SECONDS_TO_RETRY = 1.0


@dataclass
class Service:
    """One engine as it is served."""

    engine: ServedEngine
    settings: ServerSettings
    models: ServedModels
    metrics: HttpMetrics
    system_fingerprint: str
    closing: bool = False
    """Set when the process is asked to end: requests are refused from then on."""
    failed: bool = False
    """Set when it ends because its engine failed."""

    def begin_closing(self) -> None:
        """Refuse requests from now on. To be called before the engine is closed, so that a failed one is known."""
        self.failed = not self.closing and not self.engine.ready
        self.closing = True

    def check_ready(self) -> None:
        """Raise an `ApiError`, 503, where no requests are taken."""
        if self.failed or not (self.closing or self.engine.ready):
            raise engine_failed()
        if self.closing:
            raise closing()

    def check_places(self, num_answers: int) -> None:
        """Raise `QueueFullError` where several answers of one request find room for some of them only.

        A single one is the engine's to refuse, and so are those that others overtake between now and their start.
        """
        engine, max_waiting = self.engine, self.settings.max_waiting
        if num_answers == 1 or max_waiting is None:
            return
        num_free = engine.num_slots + max_waiting - engine.num_requests
        if num_answers > num_free:
            for _ in range(num_answers):
                self.metrics.refused()
            raise QueueFullError(
                f"{num_answers} answers are asked for, and {max(num_free, 0)} more may wait or be served now; "
                "try again in some seconds",
                _SECONDS_TO_RETRY,
            )

    def response_head(self, prefix: str, model: str) -> ResponseHead:
        """What the chunks of a response by `model` begin with; `prefix` is that of its id."""
        return ResponseHead(prefix, model, self.system_fingerprint)


def service_of(request: Request) -> Service:
    """The service of the application that got this request."""
    service: Service = request.app.state.service
    return service
