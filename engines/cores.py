"""How many cores this process may use, and how many threads an engine may have."""

import os
from pathlib import Path

from c2c_export.errors import UsageError


def usable_cores() -> set[int]:
    """The numbers of the logical processors that this process may run on."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Cores that this process may use, two hyper-threads of one counted once; as ONNX Runtime counts by default."""
    cores = set()
    for number in usable_cores():
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(number))
    return len(cores)


def session_threads(num_threads: int | None) -> int:
    """What ONNX Runtime is to be told: `num_threads`, or the default for None, which is `physical_cores`.

    By itself, asked for by 0, it starts a thread on each core of the machine and keeps it there, even on cores that
    this process may not use; so it chooses only where there are none.
    """
    if num_threads is not None:
        return num_threads
    return 0 if len(usable_cores()) == os.cpu_count() else physical_cores()


def check_threads(name: str, num_threads: int) -> None:
    """Raise `UsageError`, naming the argument, unless there are 1 to as many threads as the machine has processors.

    Threads take memory for a stack and spin while they wait, so more than there are processors only cost.
    """
    most = os.cpu_count() or 1
    if not 1 <= num_threads <= most:
        raise UsageError(f"{name} is {num_threads}, expected 1 to {most}, the processors of this machine")
