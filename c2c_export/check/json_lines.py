"""Read a JSON Lines file of records: one JSON object a line, empty lines left out.

In: a file's content and the pydantic model of a line. Out: the records. Not covered: reading the file itself.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from c2c_export.errors import UsageError, reason_of

Line = TypeVar("Line", bound=BaseModel)


def parse_json_lines(path: Path, content: bytes, line_type: type[Line], what: str, expected: str) -> list[Line]:
    """The records of `content`, which came from `path`; `what` names them in the plural, `expected` shows a line.

    Raises `UsageError` naming the file, and the line that is no such record; or when there are none.
    """
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                records.append(line_type.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"])
                found = f"{field}: {first['msg']}" if field else reason_of(ValueError(first["msg"]))
                raise UsageError(f"{path}: line {number}: {found}; expected {expected}") from error
    if not records:
        raise UsageError(f"{path}: holds no {what}; expected one JSON object a line")
    return records
