"""Calibration prompts: a JSON Lines file of the user's, or those that come with the package.

One prompt a line: `{"messages": [{"role": "user", "content": "…"}]}`, or `{"input_ids": [1, 2, 3]}` with the receiver's
token ids. Not covered: whether a prompt fits the bundle's capacity, which planning it tells.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from c2c_export.check.json_lines import parse_json_lines
from c2c_export.errors import UsageError

BUILT_IN = "built in"
_EXPECTED = '{"messages": [{"role": …, "content": …}]} or {"input_ids": […]}'


class ChatMessage(BaseModel):
    """One message of a prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    content: str


class CalibrationPrompt(BaseModel):
    """One prompt: messages, or the receiver's token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: tuple[ChatMessage, ...] | None = Field(default=None, min_length=1)
    input_ids: tuple[int, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _has_one_of_both(self) -> Self:
        if (self.messages is None) == (self.input_ids is None):
            raise ValueError("expected either messages or input_ids")
        return self

    @property
    def prompt(self) -> list[dict[str, str]] | list[int]:
        """What `C2CPipeline.prefill` takes."""
        if self.messages is not None:
            return [{"role": message.role, "content": message.content} for message in self.messages]
        assert self.input_ids is not None
        return list(self.input_ids)

    @property
    def text(self) -> str:
        """For a reader: the last message, or the ids."""
        return (
            " ".join(str(token) for token in self.input_ids or ()) if not self.messages else self.messages[-1].content
        )


@dataclass(frozen=True)
class Calibration:
    """The prompts, and what they came from: the file's sha256, or `BUILT_IN`."""

    prompts: Sequence[CalibrationPrompt]
    origin: str


def read_calibration(path: Path | None) -> Calibration:
    """The prompts of the file at `path`; without one those that come with the package.

    Raises `UsageError` naming file and line where one cannot be read or is no prompt.
    """
    if path is None:
        content = (files(__package__) / "calibration.jsonl").read_bytes()
        return Calibration(_parse(Path("calibration.jsonl"), content), BUILT_IN)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected a JSON Lines file of prompts") from error
    return Calibration(_parse(path, content), hashlib.sha256(content).hexdigest())


def _parse(path: Path, content: bytes) -> list[CalibrationPrompt]:
    return parse_json_lines(path, content, CalibrationPrompt, "prompts", _EXPECTED)
