"""What an operator chooses of a scheduler: how many wait, how long answers may stall, and what is kept for reuse."""

from dataclasses import dataclass

from c2c_export.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """Raises `UsageError`, naming the field, for a value out of range."""

    max_waiting: int = 64
    """Requests that may wait for a slot."""
    max_stall: float = 0.2
    """Seconds of prefilling between two decode steps, if the machine computes two rows in that time.

    Receivers with heads wider than 128 take longer: each section of a prompt is one piece (`runtime.prefill_work`).
    """
    aging_seconds: float = 10.0
    """Seconds of waiting that count as much as one level of priority."""
    prefix_cache_bytes: int = 512 * 2**20
    """Memory for rows of former prompts; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("max_waiting", "prefix_cache_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(f"{name}: {value!r} is not allowed; expected an integer, 0 or more")
        for name in ("max_stall", "aging_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise UsageError(f"{name}: {value!r} is not allowed; expected a number of seconds above 0")
