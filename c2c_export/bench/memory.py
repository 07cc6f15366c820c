"""Peak memory of this process, as Linux counts it; https://docs.kernel.org/filesystems/proc.html.

The peak (VmHWM) is that since the process began, unless it can be reset: writing 5 to /proc/self/clear_refs does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from c2c_export.bench.report import MemoryRecord
from runtime import C2CPipeline
from runtime.decoder import Decoder
from runtime.prompt import Plan

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Resident:
    """Resident memory in bytes: the peak, and what is resident now of the process's own and of mapped files."""

    peak: int
    anonymous: int | None
    file: int | None


class PeakMemory:
    """Measures from its making on, or from the beginning of the process where the peak cannot be reset."""

    def __init__(self) -> None:
        self.measured_by = "VmHWM, reset before the measurement"
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
        except OSError:
            self.measured_by = "VmHWM since the process began, as this system does not reset it"

    def read(self) -> Resident | None:
        """What was found; None where the system has no /proc."""
        return parse_status(_STATUS.read_text()) if _STATUS.is_file() else None

    def record(self, weight_bytes: int, cache_bytes: int) -> MemoryRecord | None:
        """The peak beside what must be held; None where the system has no /proc."""
        resident = self.read()
        if resident is None:
            return None
        needed = weight_bytes + cache_bytes
        return MemoryRecord(
            peak_bytes=resident.peak,
            anonymous_bytes=resident.anonymous,
            file_bytes=resident.file,
            weight_bytes=weight_bytes,
            cache_bytes=cache_bytes,
            excess=(resident.peak - needed) / needed,
            measured_by=self.measured_by,
        )


def used_cache_bytes(pipeline: C2CPipeline, plan: Plan, new_tokens: int) -> int:
    """What the rows of one request take in the caches of all models: its prompt's, and those of `new_tokens` tokens."""
    receiver_rows = len(plan.receiver.ids) + new_tokens - 1  # nothing reads the last token's row
    sharers = pipeline.prefiller.sharers
    return receiver_rows * pipeline.receiver.pool.row_bytes + sum(
        count * sharers[number].pool.row_bytes for number, count in sharer_rows(plan, sharers).items()
    )


def sharer_rows(plan: Plan, computed: Mapping[int, Decoder]) -> dict[int, int]:
    """How many tokens each sharer of `plan` computes, of those that have open gates."""
    last_fused = max((section.stop for section in plan.sections if section.fused), default=0)
    return {
        number: int((tokens.position_ids < last_fused).sum())
        for number, tokens in sorted(plan.sharers.items())
        if number in computed
    }


def available_bytes() -> int | None:
    """Memory that a process could still take, as the kernel estimates it; None where it does not tell."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE) if _MEMINFO.is_file() else None
    return None if found is None else int(found[1]) << 10


def parse_status(text: str) -> Resident | None:
    """The fields of /proc/<pid>/status, which are in KiB; None without VmHWM."""
    found = {name: int(value) << 10 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.MULTILINE)}
    if "VmHWM" not in found:
        return None
    return Resident(found["VmHWM"], found.get("RssAnon"), found.get("RssFile"))
