"""GET /v1/c2c: what is served, for the page and for whoever wants to know."""

from http import HTTPStatus
from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from c2c_export.bundle import FusionMode, SharerRecord
from runtime.server.errors import error_responses
from runtime.server.service import Service, service_of

router = APIRouter(tags=["models"])


class LayerGates(BaseModel):
    """One receiver layer that a sharer's fuser has a projector for, and whether its gates are open."""

    receiver_layer: int
    sharer_layer: int
    key: bool
    value: bool


class SharerInfo(BaseModel):
    """A sharer with its fuser."""

    number: int
    """As in the field `sharers` of a request."""
    name: str
    num_layers: int
    layers: list[LayerGates]
    """By receiver layer, rising; one that is missing has no projector."""


class ReceiverInfo(BaseModel):
    """The receiver."""

    name: str
    num_layers: int


class ModelNames(BaseModel):
    """The names to ask for."""

    c2c: str
    receiver: str | None
    """The receiver alone; null where the bundle has no sharers."""


class BundleInfo(BaseModel):
    """What is served."""

    bundle: str
    engine: str
    precision: str
    capacity: int
    """Tokens of a prompt and its answer together."""
    max_tokens: int
    """Tokens that an answer may ask for."""
    num_slots: int
    fusion_mode: FusionMode
    receiver: ReceiverInfo
    sharers: list[SharerInfo]
    models: ModelNames


def _name_of(source: str) -> str:
    # A path of the machine that exported is nobody's business.
    return PurePath(source).name.removesuffix(".gguf")


def _sharer(number: int, sharer: SharerRecord) -> SharerInfo:
    layers = [
        LayerGates(
            receiver_layer=link.receiver_layer,
            sharer_layer=link.sharer_layer,
            key=link.key_gate_open,
            value=link.value_gate_open,
        )
        for link in sorted(sharer.links, key=lambda link: link.receiver_layer)
    ]
    model = sharer.model
    return SharerInfo(number=number, name=_name_of(model.source), num_layers=model.num_layers, layers=layers)


@router.get("/v1/c2c", responses=error_responses(HTTPStatus.UNAUTHORIZED))
async def describe_bundle(service: Annotated[Service, Depends(service_of)]) -> BundleInfo:
    """Models, engine, capacity, and the gates of every sharer by layer."""
    engine, models = service.engine, service.models
    manifest, record = engine.bundle.manifest, engine.engine_choice.record
    return BundleInfo(
        bundle=engine.bundle.root.resolve().stem,
        engine=record.target,
        precision=record.precision,
        capacity=manifest.max_length,
        max_tokens=service.settings.max_tokens or manifest.max_length,
        num_slots=engine.num_slots,
        fusion_mode=manifest.fusion_mode,
        receiver=ReceiverInfo(name=_name_of(manifest.receiver.source), num_layers=manifest.receiver.num_layers),
        sharers=[_sharer(number, sharer) for number, sharer in enumerate(manifest.sharers)],
        models=ModelNames(c2c=models.with_c2c, receiver=models.receiver if manifest.sharers else None),
    )
