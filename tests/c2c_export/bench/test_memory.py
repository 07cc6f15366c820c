"""Peak memory: what is allocated after a reset shows in it, and what was freed before does not."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from c2c_export.bench.memory import PeakMemory, parse_status
from c2c_export.bench.other_load import OtherLoad, parse_busy_ticks

MEGABYTE = 1 << 20

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system has no /proc/self/clear_refs"
)


def peak_of(memory: PeakMemory) -> int:
    resident = memory.read()
    assert resident is not None
    return resident.peak


@needs_proc
def test_the_peak_is_that_since_the_measurement_began():
    before = peak_of(PeakMemory())
    large = PeakMemory()
    np.ones(256 * MEGABYTE, dtype=np.uint8).sum()
    assert peak_of(large) >= before + 200 * MEGABYTE
    after = PeakMemory()
    if "reset" not in after.measured_by.partition(",")[2] or "does not" in after.measured_by:
        pytest.skip("this system does not reset the peak")
    assert peak_of(after) < before + 100 * MEGABYTE


@needs_proc
def test_a_record_says_how_much_there_is_beyond_weights_and_caches():
    record = PeakMemory().record(weight_bytes=3 * MEGABYTE, cache_bytes=MEGABYTE)
    assert record is not None
    assert record.excess == pytest.approx(record.peak_bytes / (4 * MEGABYTE) - 1)


def test_others_work_is_told_from_ones_own():
    load = OtherLoad()
    started = time.process_time()
    while time.process_time() - started < 0.5:
        pass
    own = load.cores()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        before = OtherLoad()
        time.sleep(1.0)
        busy = before.cores()
        other.kill()
    if own is None or busy is None:
        pytest.skip("this system has no /proc/stat")
    assert busy > 0.5
    # user, nice, system, idle, iowait, irq, softirq, steal, and guests, which are users too
    assert parse_busy_ticks("cpu  10 20 30 1000 2000 1 2 3 4 5\ncpu0 1 1 1 1\n") == 66


def test_fields_are_read_in_bytes():
    resident = parse_status("Name:\tpython\nVmHWM:\t    2048 kB\nRssAnon:\t 1024 kB\nRssFile:\t    4 kB\n")
    assert resident is not None
    assert (resident.peak, resident.anonymous, resident.file) == (2 * MEGABYTE, MEGABYTE, 4096)
    assert parse_status("Name:\tpython\n") is None
