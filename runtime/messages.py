"""Chat messages: what a user gives as a prompt, checked.

In: text, mappings or `Message`s. Out: a list of `Message`s with a role and valid text each. Not covered: which roles
and orders of roles a chat template takes (the template refuses the others), and content that is not text. Nothing here
imports torch or transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from c2c_export.errors import UsageError


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `role` is what the chat template knows: system, user, assistant."""

    role: str
    content: str


def parse_messages(prompt: str | Sequence[Mapping[str, Any] | Message]) -> list[Message]:
    """The messages of a chat; a `str` is one user turn.

    Raises `UsageError`, naming the message and the field, for an empty chat, a missing, unknown or wrongly typed field,
    text that is not valid Unicode, and when no message has any text.
    """
    if isinstance(prompt, str):
        messages = [_checked(Message("user", prompt), "the prompt")]
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        messages = [_parse_message(index, entry) for index, entry in enumerate(prompt)]
    else:
        raise UsageError(
            f"the prompt is of type {type(prompt).__name__}; expected text or a list of messages with role and content"
        )
    if not any(message.content.strip() for message in messages):
        raise UsageError("the prompt is empty; expected at least one message with text")
    return messages


def _parse_message(index: int, entry: object) -> Message:
    where = f"message {index}"
    if isinstance(entry, Message):
        return _checked(entry, where)
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is of type {type(entry).__name__}; expected a mapping with role and content")
    for name in ("role", "content"):
        if name not in entry:
            raise UsageError(f"{where} has no field {name!r}; expected role and content")
    # Clients send unset fields as null; a set one would be lost without a word.
    unknown = [name for name, value in entry.items() if name not in ("role", "content") and value is not None]
    if unknown:
        raise UsageError(f"{where} has a field {unknown[0]!r}, which is not supported; expected role and content")
    return _checked(Message(entry["role"], entry["content"]), where)


def _checked(message: Message, where: str) -> Message:
    fields: tuple[tuple[str, object], ...] = (("role", message.role), ("content", message.content))
    for name, value in fields:
        if not isinstance(value, str):
            raise UsageError(f"{where}: {name} is of type {type(value).__name__}; expected text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{where}: {name} is not valid Unicode (a lone surrogate at character {error.start}); expected text"
            ) from error
    if not message.role:
        raise UsageError(f"{where}: role is empty; expected system, user or assistant")
    return message
