"""The base of what the project writes as JSON and reads again: immutable, and strict about unknown fields."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A part of a file: immutable, and an unknown field is an error rather than ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)
