"""The OpenAPI document, with what FastAPI cannot know: the names of the models, and the events of a stream.

Not covered: routes and bodies, which FastAPI describes from their types.
"""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from runtime.server.chat_response import ChatChunk
from runtime.server.completion_response import Completion
from runtime.server.errors import ErrorResponse, error_responses
from runtime.server.served_models import ServedModels

_SCHEMA = "#/components/schemas/{model}"


def generation_responses(event: type[ChatChunk] | type[Completion]) -> dict[int | str, dict[str, Any]]:
    """What a generation is answered with besides its JSON; `event` is the data of a stream's events."""
    errors = error_responses(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
    data = {"type": "string", "anyOf": [_json_of(event), _json_of(ErrorResponse), {"const": "[DONE]"}]}
    events = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    success = {"description": "The answers; with stream, as they come", "content": {"text/event-stream": events}}
    return {HTTPStatus.OK.value: success, **errors}


def _json_of(model: type[BaseModel]) -> dict[str, Any]:
    return {
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": _SCHEMA.format(model=model.__name__)},
    }


def complete_document(app: FastAPI, served: ServedModels, max_priority: int) -> None:
    """Let the document of `app` have the schema of a stream's chunks, the models that there are, and the priorities."""
    generate = app.openapi
    _, chunks = models_json_schema([(ChatChunk, "serialization")], ref_template=_SCHEMA)

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document["components"]["schemas"]
        schemas |= {name: schema for name, schema in chunks["$defs"].items() if name not in schemas}
        for request in ("ChatRequest", "CompletionRequest"):
            fields = schemas[request]["properties"]
            fields["model"]["enum"] = list(served.names)
            number = next(kind for kind in fields["priority"]["anyOf"] if kind["type"] == "integer")
            number["maximum"] = max_priority
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual has it
