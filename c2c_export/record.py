"""The base of what the project writes as JSON and reads again: immutable, and strict about unknown fields."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A part of a file: immutable, and an unknown field is an error rather than ignored."""

    # JSON has no number that is none: it is written as the string "NaN", and read as a number again.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")
