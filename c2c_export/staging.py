"""Write a bundle beside its final place and rename it into it, so that a failure leaves nothing, or the old one.

Not covered: two processes that replace the same bundle at the same moment; the later one may fail, with an error.
"""

import contextlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from c2c_export.bundle import MANIFEST_NAME
from c2c_export.errors import C2CError, UsageError


@contextlib.contextmanager
def staged_bundle(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `output`, moved to `output` when the block ends without an exception.

    Raises `UsageError` when `output` exists (with `overwrite`: and is not a bundle) or its parent cannot be written,
    `C2CError` when writing fails, as on a full disk.
    """
    check_output(output, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        try:
            partial = stack.enter_context(partial_folder(output.parent, output.name))
        except OSError as error:
            raise UsageError(f"{output}: cannot write there: {error.strerror}") from error
        try:
            yield partial
            partial.chmod(0o755)
            _move_into_place(partial, output, overwrite)
        except OSError as error:
            reason = "the disk is full" if is_disk_full(output.parent) else str(error)
            raise C2CError(f"{output}: writing the bundle failed: {reason}; nothing was left behind") from error


@contextlib.contextmanager
def partial_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, hidden and named after `name`, which is gone in the end unless it was renamed.

    Raises `OSError` when it cannot be made.
    """
    # Named before it is made: an interrupt in between would else leave it.
    folder = parent / f".{name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_disk_full(folder: Path) -> bool:
    """Whether the disk of `folder` has no room; numpy reports that without an errno, so the free space is looked at."""
    return shutil.disk_usage(folder).free < 2**20


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` unless a bundle may be written to `output`."""
    if not output.name:
        raise UsageError(f"{output}: not a name for a bundle")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such folder to write the bundle into")
    if output.is_symlink() and not output.exists():
        raise UsageError(f"{output} is a link to nothing; remove it or choose another output")
    if not output.exists():
        return
    if not overwrite:
        raise UsageError(f"{output} exists already; choose another output or pass --overwrite")
    if not _is_bundle(output) and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists and is not a bundle; --overwrite replaces bundles only")


def _is_bundle(folder: Path) -> bool:
    """Whether `folder` was a bundle, of whatever schema version, damaged or not."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "schema_version" in content


def _move_into_place(partial: Path, output: Path, overwrite: bool) -> None:
    # Looked at again: minutes have passed, and what lies there now may be somebody else's.
    check_output(output, overwrite=overwrite)
    if not output.exists():
        partial.rename(output)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    try:
        output.rename(replaced / "bundle")
        partial.rename(output)
    except BaseException:  # an interrupt too must not cost the old bundle
        if (replaced / "bundle").exists():
            (replaced / "bundle").rename(output)
        replaced.rmdir()
        raise
    shutil.rmtree(replaced, ignore_errors=True)
