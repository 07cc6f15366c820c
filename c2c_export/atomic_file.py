"""Write a file so that its place holds either all of the new content or what it held before."""

import os
import uuid
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: Any) -> None:
    """Write `content`, any bytes-like object, beside `path`, under a name of its own, and rename it into place. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
