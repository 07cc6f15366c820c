"""What other processes took of the processors during a benchmark; https://docs.kernel.org/filesystems/proc.html."""

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_BUSY_FIELDS = slice(0, 8)
"""Of the line "cpu": user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user and nice."""
_IDLE_FIELDS = slice(3, 5)


class OtherLoad:
    """Measures from its making on. What a hypervisor gave to other guests counts as others'."""

    def __init__(self) -> None:
        self._busy, self._own, self._started = _busy_seconds(), _own_seconds(), time.perf_counter()

    def cores(self) -> float | None:
        """How many processors others kept busy on average; None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        others = (busy - self._busy) - (_own_seconds() - self._own)
        return max(0.0, others / (time.perf_counter() - self._started))


def parse_busy_ticks(text: str) -> int:
    """Clock ticks that all processors together were busy since the system's start, out of /proc/stat."""
    fields = [int(field) for field in text.splitlines()[0].split()[1:]]
    return sum(fields[_BUSY_FIELDS]) - sum(fields[_IDLE_FIELDS])


def _busy_seconds() -> float | None:
    return parse_busy_ticks(_STAT.read_text()) / os.sysconf("SC_CLK_TCK") if _STAT.is_file() else None


def _own_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
