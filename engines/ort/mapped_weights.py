"""Let go of the weights that a session has mapped and does not need in memory.

In: the folder of a session's weights, once the session is made. Out: nothing; the pages of mapped files are not
resident any more. ONNX Runtime reads every weight when it makes a session, to pack a copy for its kernels. What it
keeps mapped after that are weights that are read by rows, such as embeddings, or not at all, such as scales that were
packed too. The system reads a page again when it is needed.
"""

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")  # https://docs.kernel.org/filesystems/proc.html
_MAPPING = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<stop>[0-9a-f]+) \S+ \S+ \S+ \d+ +(?P<path>/.*)\n(?:\w+: .*\n)*?Anonymous: +0 kB$",
    re.MULTILINE,
)
"""A mapped file of which nothing was written to: pages that were would be lost."""
_MADV_DONTNEED = 4  # of Linux; Python has it for mappings of its own


def let_go_of_mapped_weights(folder: Path) -> None:
    """Drop the resident pages of the files in `folder` that this process has mapped; nothing where that is not Linux.

    `madvise(MADV_DONTNEED)` of a mapped file loses nothing: https://man7.org/linux/man-pages/man2/madvise.2.html.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, stop in _unwritten_mappings(folder.resolve()):
        madvise(start, stop - start, _MADV_DONTNEED)


def _unwritten_mappings(folder: Path) -> Iterator[tuple[int, int]]:
    for found in _MAPPING.finditer(_SMAPS.read_text(errors="surrogateescape")):
        if Path(found["path"]).parent == folder:
            yield int(found["start"], 16), int(found["stop"], 16)
