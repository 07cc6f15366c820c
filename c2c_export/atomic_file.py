"""Write a file so that its place holds either all of the new content or what it held before."""

import uuid
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: Any) -> None:
    """Write `content`, any bytes-like object, beside `path` and rename it into place. Raises `OSError`.

    The name beside it is this call's own, so that two processes may write the same file; the later one stays.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
