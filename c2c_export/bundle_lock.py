"""Changing a bundle's manifest: a lock, so that builds and checks that run at once lose nothing of each other's.

Not covered: reading, which needs no lock, as the manifest is replaced at once (`c2c_export.bundle.write_manifest`).
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let no other process change the manifest meanwhile; the lock ends with the process, and leaves no file."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
