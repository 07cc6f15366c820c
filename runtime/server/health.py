"""GET and HEAD of /health, /ready and /metrics: for what watches over the process. None of them asks for a key."""

from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from runtime.server.errors import error_responses
from runtime.server.service import Service, service_of

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Requests are taken."""

    status: Literal["ready"] = "ready"


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Health:
    """Whether the process lives, also while it shuts down."""
    return Health()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses=error_responses(HTTPStatus.SERVICE_UNAVAILABLE))
async def ready(service: Annotated[Service, Depends(service_of)]) -> Readiness:
    """Whether requests are taken; 503 while the process shuts down, or after its engine failed."""
    service.check_ready()
    return Readiness()


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: Annotated[Service, Depends(service_of)]) -> Response:
    """The metrics, in Prometheus' text format."""
    service.metrics.read_engine(service.engine)
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
