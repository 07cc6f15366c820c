"""What answers to chats and completions have in common: usage, timings, the shape of ids; as OpenAI names them.

In: generations. Out: parts of a response. `c2c` is an extra field, which OpenAI's clients keep and ignore.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from pydantic import BaseModel

from runtime.generation import Generation
from runtime.request import new_request_id


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request: each prompt once, and all its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, generations: Sequence[Generation], num_answers: int) -> "Usage":
        """The usage of prompts with `num_answers` each, whose answers follow one another."""
        # The answers after a prompt's first one share its rows, which is no doing of an earlier request.
        first = generations[::num_answers]
        prompt = sum(generation.num_prompt_tokens for generation in first)
        completion = sum(len(generation.token_ids) for generation in generations)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(generation.num_reused_tokens for generation in first)
            ),
        )


class TimingsInSeconds(BaseModel):
    """Where the time of an answer went."""

    queued: float
    """Waiting for a slot."""
    sharer_prefill: float
    receiver_prefill: float
    fuse: float
    ttft: float
    """Time to first token: planning, the three phases before, and choosing the token; `queued` is not in it."""
    decode: float
    """All tokens after the first."""


class C2CDetails(BaseModel):
    """How an answer came about."""

    timings: TimingsInSeconds
    reused_tokens: int
    """Tokens of the prompt whose rows were there already."""

    @classmethod
    def of(cls, generation: Generation) -> "C2CDetails":
        """Those of a generation."""
        timings = TimingsInSeconds(**asdict(generation.timings))
        return cls(timings=timings, reused_tokens=generation.num_reused_tokens)


@dataclass(frozen=True)
class ResponseHead:
    """What every chunk of one response repeats."""

    prefix: str
    """Of the id: what kind of response it is."""
    model: str
    system_fingerprint: str
    """Equal for answers of one engine of one bundle."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""
    name: str = field(default_factory=new_request_id)

    @property
    def fields(self) -> dict[str, str | int]:
        """The fields of a response."""
        return {
            "id": f"{self.prefix}-{self.name}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }
