"""Tell what this machine could not do from what is wrong with the engine: the first must not condemn it.

In: what a level raised, and the bundle's folder. Out: the reason, if it is the machine's: no memory, a full disk, a
folder that cannot be written. Not covered: files that the bundle should have and lacks, which is damage.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from c2c_export.errors import C2CError, reason_of

_NO_MEMORY = (
    "can't allocate memory",  # torch
    "not enough memory",  # torch on Windows
    "failed to allocate",  # ONNX Runtime
    "bad_alloc",
    "bad allocation",
    "out of memory",  # CUDA
    "out_of_memory",
    "outofmemory",  # TensorRT
    "cudaerrormemoryallocation",
    "no memory for a buffer",  # our own
)
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class NotCheckedError(C2CError):
    """An engine could not be checked, which says nothing about it."""


def machine_failure(error: BaseException, bundle: Path) -> str | None:
    """Why the machine made a level raise `error`, in one line; None where the engine or its bundle did."""
    for cause in _causes(error):
        text = str(cause).lower()
        if isinstance(cause, MemoryError) or any(part in text for part in _NO_MEMORY):
            return f"there is not enough memory: {reason_of(cause)}"
        # transformers raises an OSError without a number for any file that it cannot make sense of
        if isinstance(cause, OSError) and cause.errno is not None and not _is_damage(cause, bundle):
            return reason_of(cause)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_damage(error: OSError, bundle: Path) -> bool:
    """Whether it is about a file that the bundle lacks."""
    if not isinstance(error, _MISSING) or not isinstance(error.filename, str | bytes):
        return False
    return Path(os.fsdecode(error.filename)).absolute().is_relative_to(bundle.absolute())
