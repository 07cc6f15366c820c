"""What a generation gives back: its text and tokens, why it ended, how long it took; at once or in pieces."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """Seconds of computing, without the time that a stream's reader takes.

    The prefill belongs to the first generation after it: a further one on the same prompt has zeros there.
    """

    sharer_prefill: float
    receiver_prefill: float
    fuse: float
    ttft: float
    """Time to first token: planning, the three prefill phases, and choosing the token."""
    decode: float
    """All tokens after the first."""


@dataclass(frozen=True)
class Generation:
    """What one call generated."""

    text: str
    """Without special tokens, cut before a stop string."""
    token_ids: list[int]
    """All generated ids, an ending stop token included, as transformers' `generate` returns them."""
    finish_reason: str
    """"stop" (a stop token or stop string) or "length" (`max_new_tokens` or the capacity reached)."""
    timings: Timings


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed generation. The concatenated texts of all chunks are the generation's text."""

    text: str
    token_ids: list[int]
    """The ids generated since the last chunk."""
    generation: Generation | None = None
    """The whole generation, in the last chunk only."""
