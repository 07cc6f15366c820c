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
        prompt = sum(generation.num_prompt_tokens for generation in generations[::num_answers])
        completion = sum(len(generation.token_ids) for generation in generations)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached_tokens(generations, num_answers)),
        )


def num_cached_tokens(generations: Sequence[Generation], num_answers: int) -> int:
    """The prompts' tokens whose rows were there before any of a prompt's `num_answers` answers was begun."""
    # Answers to one prompt find each other's rows, in whatever order they get their slots; the one that was begun first
    # found the fewest.
    reused = [generation.num_reused_tokens for generation in generations]
    return sum(min(reused[first : first + num_answers]) for first in range(0, len(reused), num_answers))


class TimingsInSeconds(BaseModel):
    """Where the time of an answer went."""

    queued: float
    """Waiting to be planned, and then for a slot."""
    sharer_prefill: float
    receiver_prefill: float
    fuse: float
    ttft: float
    """Time to first token: planning, the three phases before, choosing the token, and what was done for other requests
    meanwhile; `queued` is not in it."""
    decode: float
    """All tokens after the first, and what was done for other requests meanwhile."""


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
