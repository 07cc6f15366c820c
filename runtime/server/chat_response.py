"""The answers of POST /v1/chat/completions: one object, or chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, model_serializer

from runtime.generation import Chunk, Generation
from runtime.server.generation_parts import C2CDetails, ResponseHead, Usage
from runtime.server.logprobs import ChatLogprobs, TokenTexts


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    c2c: C2CDetails
    """Of the first answer."""


class Delta(BaseModel):
    """What an answer has more than in the chunk before; the role in its first one."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _without_null(self) -> dict[str, str]:
        # Clients add up what they find here.
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """A chunk of a stream: a piece of one answer, or the usage at the end."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    """In the last chunk, which has no choices; asked for with stream_options.include_usage."""
    c2c: C2CDetails | None = None
    """In the chunk that has an answer's finish_reason."""


@dataclass(frozen=True)
class ChatForm:
    """Answers to a chat, as `runtime.server.respond` asks for them."""

    head: ResponseHead
    texts: TokenTexts

    def whole(self, generations: Sequence[Generation]) -> ChatCompletion:
        """All of them at once."""
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=generation.text),
                logprobs=ChatLogprobs.of(generation.logprobs, self.texts),
                finish_reason=generation.finish_reason,
            )
            for index, generation in enumerate(generations)
        ]
        return ChatCompletion(
            **self.head.fields,
            choices=choices,
            usage=Usage.of(generations, len(generations)),
            c2c=C2CDetails.of(generations[0]),
        )

    def begin(self, index: int) -> list[ChatChunk]:
        """The role."""
        return [self._chunk(ChatChunkChoice(index=index, delta=Delta(role="assistant", content="")))]

    def piece(self, index: int, chunk: Chunk) -> list[ChatChunk]:
        """What is new of an answer, and how it ended."""
        chunks: list[ChatChunk] = []
        logprobs = ChatLogprobs.of(chunk.logprobs or None, self.texts)
        if chunk.text or logprobs is not None:
            chunks.append(self._chunk(ChatChunkChoice(index=index, delta=Delta(content=chunk.text), logprobs=logprobs)))
        if chunk.generation is not None:
            reason = chunk.generation.finish_reason
            choice = ChatChunkChoice(index=index, delta=Delta(), finish_reason=reason)
            chunks.append(self._chunk(choice, C2CDetails.of(chunk.generation)))
        return chunks

    def usage(self, usage: Usage) -> ChatChunk:
        """The usage, behind all answers."""
        return ChatChunk(**self.head.fields, choices=[], usage=usage)

    def _chunk(self, choice: ChatChunkChoice, c2c: C2CDetails | None = None) -> ChatChunk:
        return ChatChunk(**self.head.fields, choices=[choice], c2c=c2c)
