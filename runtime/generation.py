"""What a generation gives back: its text and tokens, why it ended, how long it took; at once or in pieces."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """Seconds. The prefill belongs to the first generation after it: a further one on the same prompt has zeros there.

    Of a session, all are spent on this answer, without the time that a stream's reader takes. Of a scheduler, the three
    prefill phases are; `ttft` and `decode` are wall-clock time, in which it also serves others, and with `queued` they
    make up the time from the request's submission to its last token.
    """

    sharer_prefill: float
    receiver_prefill: float
    fuse: float
    ttft: float
    """Time to first token: planning, the three prefill phases, and choosing the token; `queued` is not in it."""
    decode: float
    """All tokens after the first."""
    queued: float = 0.0
    """Waiting to be planned, and then for a slot; only a scheduler lets requests wait."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a generated token was to the model, before any sampling option changed its logits."""

    token_id: int
    logprob: float
    """Natural logarithm of the probability."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there with theirs, the likeliest first, as many as were asked for."""


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
    num_prompt_tokens: int = 0
    """The receiver's, without padding."""
    num_reused_tokens: int = 0
    """Those of them whose rows were there already, of an earlier turn or another request."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `token_ids`, if asked for."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed generation. The concatenated texts of all chunks are the generation's text."""

    text: str
    token_ids: list[int]
    """The ids generated since the last chunk."""
    generation: Generation | None = None
    """The whole generation, in the last chunk only."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `token_ids`, if asked for."""
