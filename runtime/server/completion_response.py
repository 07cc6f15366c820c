"""The answers of POST /v1/completions: one object, or chunks of the same form."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from runtime.generation import Chunk, Generation
from runtime.server.generation_parts import C2CDetails, ResponseHead, Usage
from runtime.server.logprobs import CompletionLogprobs, TokenTexts


class CompletionChoice(BaseModel):
    """One answer, or a piece of it."""

    index: int
    """Answer i to prompt p of those with n answers each has p * n + i."""
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    """null in all pieces but the last."""


class Completion(BaseModel):
    """The answers to prompts, or a chunk of a stream: a piece of one answer, or the usage at the end."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    """In a stream in the last chunk, which has no choices; asked for with stream_options.include_usage."""
    c2c: C2CDetails | None = None
    """Of the first answer; in a stream in the chunk that has an answer's finish_reason."""


@dataclass(frozen=True)
class CompletionForm:
    """Answers to prompts, as `runtime.server.respond` asks for them."""

    head: ResponseHead
    texts: TokenTexts
    num_answers: int
    """To each prompt."""
    _offsets: dict[int, int] = field(default_factory=dict)
    """Of the next token of each answer."""

    def whole(self, generations: Sequence[Generation]) -> Completion:
        """All of them at once."""
        choices = [
            CompletionChoice(
                index=index,
                text=generation.text,
                logprobs=CompletionLogprobs.of(generation.logprobs, self.texts),
                finish_reason=generation.finish_reason,
            )
            for index, generation in enumerate(generations)
        ]
        return Completion(
            **self.head.fields,
            choices=choices,
            usage=Usage.of(generations, self.num_answers),
            c2c=C2CDetails.of(generations[0]),
        )

    def begin(self, index: int) -> list[Completion]:
        """Nothing: a completion has no role."""
        return []

    def piece(self, index: int, chunk: Chunk) -> list[Completion]:
        """What is new of an answer, and how it ended."""
        logprobs = CompletionLogprobs.of(chunk.logprobs or None, self.texts, self._offsets.get(index, 0))
        if logprobs is not None:
            self._offsets[index] = logprobs.end
        generation = chunk.generation
        if generation is None and not chunk.text and logprobs is None:
            return []
        choice = CompletionChoice(
            index=index,
            text=chunk.text,
            logprobs=logprobs,
            finish_reason=None if generation is None else generation.finish_reason,
        )
        details = None if generation is None else C2CDetails.of(generation)
        return [Completion(**self.head.fields, choices=[choice], c2c=details)]

    def usage(self, usage: Usage) -> Completion:
        """The usage, behind all answers."""
        return Completion(**self.head.fields, choices=[], usage=usage)
