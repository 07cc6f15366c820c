"""What a scheduler tells of its work, as it happens: the base of metrics. Every method does nothing here.

All are called by the scheduler's own thread, but `queued` and `refused`, which the submitting thread calls; they must
return at once and not raise.
"""

from runtime.generation import Generation


class SchedulerObserver:
    """Override what is of interest. Times are in seconds."""

    def queued(self, num_waiting: int) -> None:
        """A request was taken into the queue, which holds so many now."""

    def refused(self) -> None:
        """A request was refused, as the queue was full."""

    def started(self, waited: float, num_waiting: int) -> None:
        """A request got a slot after waiting so long; so many wait still."""

    def prefilled(self, prompt_tokens: int, reused_tokens: int) -> None:
        """A prompt is prefilled and fused; so many of its receiver tokens were reused from another request's."""

    def first_token(self, seconds: float) -> None:
        """A request has its first token, so long after its submission."""

    def next_token(self, seconds: float) -> None:
        """A request has a further token, so long after the one before it."""

    def finished(self, generation: Generation) -> None:
        """A request ended with an answer."""

    def failed(self, error: Exception) -> None:
        """A request ended without one: `AbortedError`, `DeadlineError`, `ClosedError`, or what went wrong."""

    def stepped(self, num_decoding: int, num_prefilling: int, num_waiting: int, cached_bytes: int) -> None:
        """The scheduler went once round: what it holds now; `cached_bytes` are those of rows kept for reuse."""
