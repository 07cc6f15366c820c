"""A request that a scheduler has taken: planned, and in one of its stages until it ends."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.generation import Chunk, Generation, Timings, TokenLogprob
from runtime.kept_rows import SharerRows
from runtime.logprobs import token_logprob
from runtime.prefill import Prefill, PrefillTimings
from runtime.prompt import Plan
from runtime.reply import Reply
from runtime.request import Request
from runtime.sampling import Sampler
from runtime.slot_state import SlotState

Listener = Callable[[Chunk | Exception], None]
"""Gets every chunk of an answer, of which the last has the whole generation; or else, last, the error that ended it."""


@dataclass(eq=False)
class ActiveRequest:
    """One request from its submission to its end. Times are those of `time.perf_counter`."""

    request: Request
    plan: Plan
    reply: Reply
    sampler: Sampler
    listener: Listener
    submitted: float = field(default_factory=time.perf_counter)
    planning_seconds: float = 0.0
    """Of the time since `submitted`: what planning took, without the wait for its turn."""
    aborted: bool = False

    sharer_rows: Mapping[int, "Future[SharerRows]"] = field(default_factory=dict)
    """Of sharers that read the prompt elsewhere."""
    slot: int = -1
    started: float = 0.0
    """When it got its slot."""
    prefill: Prefill | None = None
    """While it is prefilled; None until it is its turn."""
    logits: NDArray[np.float32] | None = None
    """The prompt's, until the first token is chosen."""
    state: SlotState = field(default_factory=SlotState)
    """What the slot's rows hold, once it is prefilled."""
    next_position: int = 0
    prefill_timings: PrefillTimings = field(default_factory=lambda: PrefillTimings(0.0, 0.0, 0.0))
    num_reused_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def overdue(self) -> bool:
        """Whether its deadline has passed."""
        return self.request.is_overdue(self.submitted)

    def take_token(self, logits: NDArray[np.float32]) -> Chunk:
        """Choose the next token by its logits [V]. Raises `C2CError` where they are not finite."""
        token_id = self.sampler.sample(logits, self.state.receiver.ids)
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = [token_logprob(logits, token_id, self.request.logprobs)]
            self.logprobs += logprobs
        text = self.reply.push(token_id)
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        return Chunk(text, [token_id], logprobs=logprobs)

    def last_chunk(self) -> Chunk:
        """The rest of the text, and the whole generation; to be asked once, when the reply has ended."""
        rest = self.reply.finish()
        timings = Timings(
            sharer_prefill=self.prefill_timings.sharer_prefill,
            receiver_prefill=self.prefill_timings.receiver_prefill,
            fuse=self.prefill_timings.fuse,
            ttft=self.first_token_at - self.started + self.planning_seconds,
            decode=self.last_token_at - self.first_token_at,
            queued=self.started - self.submitted - self.planning_seconds,
        )
        generation = Generation(
            self.reply.text,
            self.reply.token_ids,
            self.reply.finish_reason,
            timings,
            num_prompt_tokens=len(self.plan.receiver.ids),
            num_reused_tokens=self.num_reused_tokens,
            logprobs=self.logprobs if self.request.logprobs is not None else None,
        )
        return Chunk(rest, [], generation)
