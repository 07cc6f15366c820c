"""What every route of one application works with."""

from dataclasses import dataclass

from fastapi import Request

from runtime.server.generation_parts import ResponseHead
from runtime.server.metrics import ServerMetrics
from runtime.server.served_engine import ServedEngine
from runtime.server.served_models import ServedModels
from runtime.server.settings import ServerSettings


@dataclass
class Service:
    """One engine as it is served."""

    engine: ServedEngine
    settings: ServerSettings
    models: ServedModels
    metrics: ServerMetrics
    system_fingerprint: str
    closing: bool = False
    """Set when the process is asked to end: requests are refused from then on."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self.closing and self.engine.ready

    def response_head(self, prefix: str, model: str) -> ResponseHead:
        """What the chunks of a response by `model` begin with; `prefix` is that of its id."""
        return ResponseHead(prefix, model, self.system_fingerprint)


def service_of(request: Request) -> Service:
    """The service of the application that got this request."""
    service: Service = request.app.state.service
    return service
