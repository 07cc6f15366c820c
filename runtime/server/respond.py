"""One request answered: whole, or in server-sent events; the same for chats and completions but for the form.

In: the engine's requests, and the form in which their answers are told. Out: a response. Errors before the first token
are HTTP errors; later ones are an event {"error": …}, after which the stream ends without [DONE].
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel

from c2c_export.errors import C2CError
from runtime.generation import Chunk, Generation
from runtime.request import Request
from runtime.server.answers import answers_in_pieces, whole_answers
from runtime.server.connection import EventStream, while_connected
from runtime.server.errors import as_api_error
from runtime.server.generation_fields import GenerationFields
from runtime.server.generation_parts import Usage
from runtime.server.request_log import RequestRecord, log_failure, record_of
from runtime.server.service import Service


class AnswerForm(Protocol):
    """How answers are told."""

    def whole(self, generations: Sequence[Generation]) -> BaseModel:
        """All of them at once."""

    def begin(self, index: int) -> Sequence[BaseModel]:
        """What a stream begins an answer with."""

    def piece(self, index: int, chunk: Chunk) -> Sequence[BaseModel]:
        """A piece of an answer."""

    def usage(self, usage: Usage) -> BaseModel:
        """What a stream ends with, if asked for."""


@dataclass(frozen=True)
class Call:
    """A request of a client, ready to be served."""

    http: HttpRequest
    service: Service
    body: GenerationFields
    requests: Sequence[Request]
    """Those of one prompt together."""
    form: AnswerForm
    prompt_field: str
    tokens_field: str

    @property
    def num_answers(self) -> int:
        """To each prompt."""
        return self.body.n or 1

    @property
    def record(self) -> RequestRecord:
        """What is logged of it."""
        return record_of(self.http.scope)

    async def respond(self) -> Response:
        """Serve it. Raises an `ApiError`, or `ClientGoneError` when the client leaves meanwhile."""
        record, engine = self.record, self.service.engine
        record.model, record.stream, record.choices = self.body.model, bool(self.body.stream), len(self.requests)
        try:
            self.service.check_places(len(self.requests))
            if not self.body.stream:
                generations = await while_connected(self.http, whole_answers(engine, self.requests))
                self._done(generations)
                return Response(self.form.whole(generations).model_dump_json(), media_type="application/json")
            pieces = answers_in_pieces(engine, self.requests)
            first = await while_connected(self.http, _next(pieces))
        except C2CError as error:
            raise as_api_error(error, self.prompt_field, self.tokens_field) from error
        return EventStream(self._events(first, pieces), close=pieces.aclose)

    async def _events(
        self, first: tuple[int, Chunk], pieces: AsyncGenerator[tuple[int, Chunk], None]
    ) -> AsyncGenerator[str, None]:
        """The data of every event; errors are one, too."""
        record, generations = self.record, dict[int, Generation]()
        record.completion_tokens = 0
        try:
            for index in range(len(self.requests)):
                for content in self.form.begin(index):
                    yield content.model_dump_json()
            async for index, chunk in _chain(first, pieces):
                record.completion_tokens += len(chunk.token_ids)
                for content in self.form.piece(index, chunk):
                    yield content.model_dump_json()
                if chunk.generation is not None:
                    generations[index] = chunk.generation
            ordered = [generations[index] for index in range(len(self.requests))]
            self._done(ordered)
            if self.body.include_usage:
                yield self.form.usage(Usage.of(ordered, self.num_answers)).model_dump_json()
            yield "[DONE]"
        except Exception as error:
            answer = as_api_error(error, self.prompt_field, self.tokens_field)
            record.failed(answer)
            if not isinstance(error, C2CError):
                log_failure(record, error)
            yield answer.json()

    def _done(self, generations: Sequence[Generation]) -> None:
        self.record.done(generations, self.num_answers, with_text=self.service.settings.log_prompts)


async def _next(pieces: AsyncGenerator[tuple[int, Chunk], None]) -> tuple[int, Chunk]:
    return await anext(pieces)


async def _chain(
    first: tuple[int, Chunk], pieces: AsyncGenerator[tuple[int, Chunk], None]
) -> AsyncGenerator[tuple[int, Chunk], None]:
    yield first
    async for piece in pieces:
        yield piece
