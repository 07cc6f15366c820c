"""What is asked of a scheduler, and the errors with which it can end a request.

In: a prompt and the options of its generation. Not covered: what comes back (`runtime.generation`), and when a request
is served (`runtime.request_queue`, `runtime.scheduler`).
"""

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from c2c_export.errors import C2CError, UsageError
from runtime.conversation import Prompt
from runtime.kept_rows import SharerRows
from runtime.prompt import ModelTokens
from runtime.sampling import SamplingParams

ReadSharers = Callable[[Mapping[int, ModelTokens]], Mapping[int, "Future[SharerRows]"]]
"""Given what sharers are to read, by number: a future of the rows of each that reads it elsewhere."""
MAX_ALTERNATIVES = 20
"""Of `Request.logprobs`."""
_PRIORITIES = range(-100, 101)


class QueueFullError(C2CError):
    """More requests wait than the queue holds; nothing was begun. `retry_after` is an estimate, in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type["QueueFullError"], tuple[str, float]]:
        # An exception is pickled with its message alone.
        return type(self), (str(self), self.retry_after)


class DeadlineError(C2CError):
    """A request's deadline passed before it was done."""


class AbortedError(C2CError):
    """A request was aborted."""


class ClosedError(C2CError):
    """The engine is closing, or closed, and takes no more requests; or it closed before this one was done."""


def new_request_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation. Raises `UsageError`, naming the field, for a value out of range."""

    prompt: Prompt
    """Messages, a str (one user turn), or receiver token ids."""
    fuse: bool = True
    """False is the receiver alone, on its plain prompt."""
    sharers: Sequence[int] | None = None
    """The numbers of the sharers to use; None is all of them."""
    max_new_tokens: int | None = None
    """None goes on to the capacity."""
    shorten: bool = False
    """Where `max_new_tokens` would exceed the capacity, generate what has room, rather than refuse the request."""
    ignore_eos: bool = False
    """Go on after stop tokens."""
    stop: str | Sequence[str] = ()
    """Strings before the first of which the text ends."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    logprobs: int | None = None
    """How many alternatives are wanted beside each token's own log-probability, 0 to 20; None wants neither."""
    priority: int = 0
    """A request of higher priority is served first, -100 to 100."""
    deadline: float | None = None
    """Seconds from submission after which the request ends with a `DeadlineError`, wherever it is."""
    client: str = ""
    """Whom the request is for: clients of one priority take turns."""
    request_id: str = field(default_factory=new_request_id)
    read_sharers: ReadSharers | None = None
    """Lets sharers read the prompt elsewhere: their rows are awaited rather than computed here.

    It is called once, by the thread that plans the prompt, with what each sharer that computes anything reads.
    """

    def __post_init__(self) -> None:
        for name in ("fuse", "shorten", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}: {getattr(self, name)!r} is not allowed; expected True or False")
        wanted = self.max_new_tokens
        if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
            raise UsageError(f"max_new_tokens: {wanted!r} is not allowed; expected an integer of at least 1, or None")
        if self.read_sharers is not None and not callable(self.read_sharers):
            raise UsageError(f"read_sharers: {self.read_sharers!r} is not allowed; expected a function")
        if self.logprobs is not None:
            _check_count("logprobs", self.logprobs, range(MAX_ALTERNATIVES + 1))
        _check_count("priority", self.priority, _PRIORITIES)
        for name in ("client", "request_id"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name}: {getattr(self, name)!r} is not allowed; expected a string")
        if not isinstance(self.sampling, SamplingParams):
            raise UsageError(f"sampling: {self.sampling!r} is not allowed; expected SamplingParams")
        if self.deadline is not None and not (
            isinstance(self.deadline, int | float)
            and not isinstance(self.deadline, bool)
            and 0 < self.deadline < math.inf
        ):
            raise UsageError(f"deadline: {self.deadline!r} is not allowed; expected a number of seconds above 0")

    def is_overdue(self, since: float) -> bool:
        """Whether its deadline has passed, if it was asked for at `since`, by `time.perf_counter`."""
        return self.deadline is not None and time.perf_counter() - since > self.deadline


def _check_count(name: str, value: object, allowed: range) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise UsageError(
            f"{name}: {value!r} is not allowed; expected an integer from {allowed.start} to {allowed.stop - 1}"
        )
