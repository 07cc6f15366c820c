"""How many cores this process may use, and how many threads an engine may have."""

import math
import os
from pathlib import Path

from c2c_export.errors import UsageError


def usable_cores() -> set[int]:
    """The numbers of the logical processors that this process may run on."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many processors' time the control groups of this process grant it; None without a limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), and cpu.cfs_quota_us of version 1. The process's own
    group and those above it limit it, and inside a container the own group may be the root.
    """
    limits = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        folder = Path(path.lstrip("/"))
        limits += [_granted(top / group) for group in (folder, *folder.parents)]
    found = [limit for limit in limits if limit is not None]
    return min(found, default=None)


def _granted(group: Path) -> float | None:
    """Processors that one control group grants; None where it sets no limit."""
    if (group / "cpu.max").is_file():
        quota, period = (group / "cpu.max").read_text().split()
    elif (group / "cpu.cfs_quota_us").is_file():
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def physical_cores() -> int:
    """Cores that this process may use, two hyper-threads of one counted once; as ONNX Runtime counts by default.

    No more than `cpu_quota`, rounded up: further threads would be stopped, and those that wait for them spin.
    """
    cores = set()
    for number in usable_cores():
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(number))
    return min(len(cores), math.ceil(cpu_quota() or len(cores)))


def whole_processors() -> int:
    """Logical processors of this machine, or the whole ones that `cpu_quota` grants, if fewer; at least 1."""
    processors = os.cpu_count() or 1
    return max(1, min(processors, math.floor(cpu_quota() or processors)))


def session_threads(num_threads: int | None) -> int:
    """What ONNX Runtime is to be told: `num_threads`, or the default for None, which is `physical_cores`.

    By itself, asked for by 0, it starts a thread on each core of the machine and keeps it there, even on cores that
    this process may not use; so it chooses only where there are none.
    """
    if num_threads is not None:
        return num_threads
    whole = len(usable_cores()) == os.cpu_count() and cpu_quota() is None
    return 0 if whole else physical_cores()


def check_threads(name: str, num_threads: int) -> None:
    """Raise `UsageError`, naming the argument, unless there are 1 to as many threads as `usable_cores`.

    Threads take memory for a stack and spin while they wait, so more than there are processors only cost.
    """
    most = len(usable_cores())
    if not 1 <= num_threads <= most:
        raise UsageError(f"{name} is {num_threads}, expected 1 to {most}, the processors that this process may use")
