"""Questions with choices: a JSON Lines file of the user's.

One question a line: `{"question": "…", "choices": ["…", "…"], "answer": 1}`, the answer being the index of the right
choice, from 0. Further fields are ignored. `check_askable` finds those that a bundle has no room or no tokens for. Not
covered: how they are asked, see the level `questions`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from c2c_export.errors import UsageError, reason_of
from runtime import C2CPipeline, Message


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
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected a JSON Lines file of questions") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                questions.append(Question.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"])
                what = f"{field}: {first['msg']}" if field else reason_of(ValueError(first["msg"]))
                raise UsageError(
                    f'{path}: line {number}: {what}; expected {{"question": …, "choices": […], "answer": 0}}'
                ) from error
    if not questions:
        raise UsageError(f"{path}: holds no questions; expected one JSON object a line")
    return questions


def check_askable(questions: Sequence[Question], pipeline: C2CPipeline) -> None:
    """Raise `UsageError`, naming the question, where the receiver's prompt and a choice exceed the bundle's capacity,
    or where a choice has no tokens of its own."""
    capacity = pipeline.bundle.manifest.max_length
    for number, question in enumerate(questions):
        try:
            messages = [Message("user", question.question)]
            prompt = pipeline.make_plan(messages, [], ())
            for choice in question.choices:
                length = len(prompt.receiver.ids) + len(pipeline.continuation_ids(messages, [], [], choice))
                if length > capacity:
                    raise UsageError(f"with {choice!r} it takes {length} tokens, this bundle's capacity is {capacity}")
        except UsageError as error:
            raise UsageError(f"--questions: question {number} ({question.question:.60}): {error}") from error
