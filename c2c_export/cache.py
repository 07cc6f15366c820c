"""Where this project keeps what is worth keeping between runs: converted models, TensorRT's kernel measurements.

`$C2C_EXPORT_CACHE`, or `c2c-export` in `$XDG_CACHE_HOME` or `~/.cache`. It may be deleted at any time.
"""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder, which need not exist."""
    named = os.environ.get("C2C_EXPORT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "c2c-export"
