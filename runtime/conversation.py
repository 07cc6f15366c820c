"""What a user says to the receiver: text, chat messages, or token ids; and a conversation of it, turn by turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from c2c_export.errors import UsageError
from runtime.messages import Message, parse_messages
from runtime.prompt import parse_ids

Prompt = str | Sequence[Mapping[str, Any] | Message] | Sequence[int]
"""A str is one user turn."""


@dataclass
class Conversation:
    """What the user has said so far: messages, or token ids."""

    messages: list[Message] | None
    """None is a conversation of token ids."""
    ids: list[int]

    @classmethod
    def of(cls, prompt: Prompt) -> "Conversation":
        """The conversation that a first prompt begins. Raises `UsageError` for one that is neither."""
        if is_ids(prompt):
            return cls(None, as_ids(prompt))
        return cls(parse_messages(prompt), [])  # type: ignore[arg-type]


def is_ids(prompt: Any) -> bool:
    """Whether a prompt is a row of token ids rather than messages or text."""
    if isinstance(prompt, np.ndarray):
        return True
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and bool(prompt)
        and not any(isinstance(part, Mapping | Message | str) for part in prompt)
    )


def as_ids(prompt: Any) -> list[int]:
    """The ids of a prompt to a conversation of token ids. Raises `UsageError` for text or messages."""
    if isinstance(prompt, str) or (not isinstance(prompt, np.ndarray) and prompt and not is_ids(prompt)):
        raise UsageError("this session holds token ids; append token ids, not messages")
    ids: list[int] = parse_ids(prompt).tolist()
    return ids


def one_prompt(messages: str | Sequence[Any] | None, input_ids: Sequence[int] | None) -> Prompt:
    """Whichever of the two is given. Raises `UsageError` unless it is exactly one, of its own kind."""
    if (messages is None) == (input_ids is None):
        raise UsageError("give either messages or input_ids")
    if messages is not None and is_ids(messages):
        raise UsageError("messages holds numbers; give token ids as input_ids")
    if input_ids is not None and not is_ids(input_ids):
        raise UsageError("input_ids holds no token ids; expected a row of integers, or give text as messages")
    return messages if messages is not None else input_ids  # type: ignore[return-value]
