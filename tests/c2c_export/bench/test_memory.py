"""Peak memory: what is allocated after a reset shows in it, and what was freed before does not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from c2c_export.bench import other_load
from c2c_export.bench.machine_speed import _product_session
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


@needs_proc
def test_the_machines_own_measure_holds_its_matrix_twice_at_most():
    # From a file, and as the session packs it.
    memory = PeakMemory()
    before = memory.read()
    if "does not" in memory.measured_by or before is None or before.anonymous is None or before.file is None:
        pytest.skip("this system does not reset the peak")
    k, n = 4096, 8192
    session = _product_session(k, n, threads=1)
    assert peak_of(memory) < before.anonymous + before.file + 2.6 * 4 * k * n
    (product,) = session.run(None, {"a": np.ones((1, k), dtype=np.float32)})
    assert (product == k / 2).all()


PROC_STAT = "cpu  {user} 20 30 {idle} 2000 1 2 3 4 5\ncpu0 1 1 1 1\n"
"""user, nice, system, idle, iowait, irq, softirq, steal, and guests, which are users too."""


class Moment:
    """What a machine of 100 ticks a second shows at one time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.now = self.own = 0.0
        self._stat = folder / "stat"
        monkeypatch.setattr(other_load, "_STAT", self._stat)
        monkeypatch.setattr(other_load.os, "sysconf", lambda _: 100)
        monkeypatch.setattr(other_load.os, "times", lambda: os.times_result((self.own, 0.0, 0.0, 0.0, 0.0)))
        monkeypatch.setattr(other_load.time, "perf_counter", lambda: self.now)
        self.show(busy=0.0)

    def show(self, *, busy: float) -> None:
        """`busy` processor seconds have been spent by all."""
        self._stat.write_text(PROC_STAT.format(user=10 + round(100 * busy), idle=1000 + round(300 * self.now)))


@pytest.mark.parametrize(("others", "expected"), [(0.0, 0.0), (3.0, 1.5), (-0.1, 0.0)], ids=["quiet", "busy", "ticks"])
def test_others_work_is_told_from_ones_own(
    others: float, expected: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    moment = Moment(monkeypatch, tmp_path)
    load = OtherLoad()
    # Two seconds later, of which this process computed 1.7.
    moment.now, moment.own = 2.0, 1.7
    moment.show(busy=1.7 + others)
    assert load.cores() == pytest.approx(expected)


def test_a_process_that_computes_is_seen_by_others():
    program = [sys.executable, "-c", "print('begun', flush=True)\nwhile True: pass"]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        before = OtherLoad()
        time.sleep(1.0)
        busy = before.cores()
        other.kill()
    if busy is None:
        pytest.skip("this system has no /proc/stat")
    assert busy > 0.3
    assert parse_busy_ticks(PROC_STAT.format(user=10, idle=1000)) == 66


def test_fields_are_read_in_bytes():
    resident = parse_status("Name:\tpython\nVmHWM:\t    2048 kB\nRssAnon:\t 1024 kB\nRssFile:\t    4 kB\n")
    assert resident is not None
    assert (resident.peak, resident.anonymous, resident.file) == (2 * MEGABYTE, MEGABYTE, 4096)
    assert parse_status("Name:\tpython\n") is None
