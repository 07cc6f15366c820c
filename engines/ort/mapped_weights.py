"""Let go of the weights that a session has mapped and does not need in memory.

In: the folder of a session's weights, once the session is made. Out: nothing; the pages of mapped files are not
resident any more. ONNX Runtime reads every weight when it makes a session, to pack a copy for its kernels. What it
keeps mapped after that are weights that are read by rows, such as embeddings, or not at all, such as scales that were
packed too. The system reads a page again when it is needed.
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")  # https://docs.kernel.org/filesystems/proc.html
_MADV_PAGEOUT = 21  # of Linux 5.4 and later


def let_go_of_mapped_weights(folder: Path) -> None:
    """Drop the resident pages of the files in `folder` that this process has mapped; nothing where that is not Linux.

    Whatever lies at the addresses by then, nothing is lost: `madvise(MADV_PAGEOUT)` writes out what is not on disk, and
    leaves what other processes have mapped too (https://man7.org/linux/man-pages/man2/madvise.2.html). A kernel or
    file that it is not allowed for keeps its pages.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, stop in _mappings(folder.resolve()):
        madvise(start, stop - start, _MADV_PAGEOUT)


def _mappings(folder: Path) -> Iterator[tuple[int, int]]:
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        addresses, _, _, _, _, *path = line.split(None, 5)
        if path and Path(path[0]).parent == folder:
            start, stop = addresses.split("-")
            yield int(start, 16), int(stop, 16)
