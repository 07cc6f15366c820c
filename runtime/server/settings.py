"""What an application is told beside its engine: names, keys and limits.

In: the values that `c2c-export serve` takes, or that another host of the application gives. Not covered: what concerns
the process, such as its port (`runtime.server.serve`).
"""

import math
import os
from dataclasses import dataclass

from c2c_export.errors import UsageError

DEFAULT_MAX_BODY = 1 << 20
DEFAULT_TIMEOUT = 600.0
DEFAULT_MAX_CHOICES = 64
MAX_PRIORITY = 100
API_KEYS = "C2C_EXPORT_API_KEYS"
"""The environment variable with API keys, with spaces between."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Raises `UsageError`, naming the field, for a value out of range."""

    model_name: str | None = None
    """The model with C2C; the receiver alone is this with "-receiver" behind it. None is the bundle folder's stem."""
    api_keys: tuple[str, ...] = ()
    """Any of these is asked for; none asks for none."""
    max_body: int = DEFAULT_MAX_BODY
    """Bytes of a request's body."""
    max_tokens: int | None = None
    """Tokens that one answer may ask for; None is the bundle's capacity."""
    max_choices: int = DEFAULT_MAX_CHOICES
    """Answers of one request: prompts times `n`."""
    timeout: float = DEFAULT_TIMEOUT
    """Seconds that a request may take, waiting included; 0 is without end."""
    max_waiting: int | None = None
    """Requests that may wait in the engine; None where that is not known. Where it is, the answers of one request begin
    together or not at all."""
    max_priority: int = 0
    """The highest priority that a client may ask for."""
    log_prompts: bool = False
    """Log what was asked and answered."""

    def __post_init__(self) -> None:
        if self.model_name is not None and not (self.model_name.isprintable() and self.model_name.strip()):
            raise UsageError(f"model_name: {self.model_name!r} is not allowed; expected printable text")
        for key in self.api_keys:
            # What a header can carry unchanged.
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise UsageError("api_keys: a key is empty, or has characters other than printable ASCII or a space")
        _check_count("max_body", self.max_body)
        _check_count("max_choices", self.max_choices)
        if self.max_tokens is not None:
            _check_count("max_tokens", self.max_tokens)
        if self.max_waiting is not None and self.max_waiting < 0:
            raise UsageError(f"max_waiting: {self.max_waiting} is not allowed; expected 0 or more")
        if not -MAX_PRIORITY <= self.max_priority <= MAX_PRIORITY:
            raise UsageError(
                f"max_priority: {self.max_priority} is not allowed; expected -{MAX_PRIORITY} to {MAX_PRIORITY}"
            )
        if not (math.isfinite(self.timeout) and self.timeout >= 0):
            raise UsageError(
                f"timeout: {self.timeout!r} is not allowed; expected a number of seconds, or 0 for as many as it takes"
            )


def keys_of_environment() -> tuple[str, ...]:
    """The API keys in the environment variable; none where it is not set.

    Raises `UsageError` where it is set and blank: who sets it wants keys to be asked for.
    """
    value = os.environ.get(API_KEYS)
    if value is not None and not value.strip():
        raise UsageError(f"{API_KEYS}: this environment variable is set but blank; give it API keys, or unset it")
    return tuple((value or "").split())


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name}: {value} is not allowed; expected an integer of at least 1")
