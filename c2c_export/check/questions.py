"""Questions with choices: a JSON Lines file of the user's.

One question a line: `{"question": "…", "choices": ["…", "…"], "answer": 1}`, the answer being the index of the right
choice, from 0. Further fields are ignored. Not covered: how they are asked, see the level `questions`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from c2c_export.check.json_lines import parse_json_lines
from c2c_export.errors import UsageError


class Question(BaseModel):
    """One question; `answer` is the index of the right choice."""

    model_config = ConfigDict(frozen=True)

    question: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    answer: StrictInt = Field(ge=0)

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer}, but the {len(self.choices)} choices are counted from 0")
        return self


def read_questions(path: Path) -> Sequence[Question]:
    """The questions of a file. Raises `UsageError` naming file and line where one cannot be read or is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected a JSON Lines file of questions") from error
    return parse_json_lines(path, content, Question, "questions", '{"question": …, "choices": […], "answer": 0}')
