"""GET /v1/models: the models that are served."""

import time
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from runtime.server.errors import error_responses
from runtime.server.service import Service, service_of

router = APIRouter(tags=["models"])
_started = int(time.time())


class ServedModel(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Seconds since 1970: when this process began."""
    owned_by: Literal["c2c-export"] = "c2c-export"
    max_model_len: int
    """Tokens of a prompt and its answer together."""


class ServedModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


def _model(name: str, service: Service) -> ServedModel:
    return ServedModel(id=name, created=_started, max_model_len=service.engine.bundle.manifest.max_length)


@router.get("/v1/models", responses=error_responses(HTTPStatus.UNAUTHORIZED))
async def list_models(service: Annotated[Service, Depends(service_of)]) -> ServedModelList:
    """The model with C2C, and the receiver alone."""
    return ServedModelList(data=[_model(name, service) for name in service.models.names])


@router.get("/v1/models/{model:path}", responses=error_responses(HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND))
async def retrieve_model(model: str, service: Annotated[Service, Depends(service_of)]) -> ServedModel:
    """One of them."""
    service.models.check(model)
    return _model(model, service)
