"""The base of what the project writes as JSON and reads again: immutable, and strict about unknown fields."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A part of a file: immutable, and an unknown field is an error rather than ignored.

    A number that is none, or infinite, is written as the string `"NaN"`, `"Infinity"` or `"-Infinity"`, and read again
    as that number. JSON has no such numbers, and pydantic's own `null` could not be read back into a float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")
