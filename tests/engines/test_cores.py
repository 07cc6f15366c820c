"""Threads are those of the processors that this process may use, on systems that do not tell them too."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from c2c_export.errors import UsageError
from engines import cores

HAS_AFFINITY = hasattr(os, "sched_setaffinity") and Path("/proc/self/task").is_dir()

# Starts a session on one of several processors, and prints where its threads may run.
ON_ONE_PROCESSOR = """
import os, sys
from pathlib import Path
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from engines.ort.engine import OrtCpuEngine
engine = OrtCpuEngine(Path(sys.argv[1]))
for task in Path("/proc/self/task").iterdir():
    print(os.sched_getaffinity(int(task.name)) == os.sched_getaffinity(0))
"""


def test_a_system_without_affinity_counts_all_processors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cores.usable_cores() == {0, 1, 2}
    assert 1 <= cores.physical_cores() <= 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.usable_cores() == {0}


QUOTAS = {
    "v2, one and a half": ({"a/b/cpu.max": "150000 100000\n"}, "0::/a/b\n", 1.5),
    "v2, that of a group above": ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, "0::/a/b\n", 3),
    "v2, a container's root": ({"cpu.max": "50000 100000\n"}, "0::/\n", 0.5),
    "v2, none": ({"a/cpu.max": "max 100000\n"}, "0::/a\n", None),
    "v1": (
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        "5:memory:/z\n4:cpu,cpuacct:/a\n",
        2,
    ),
    "v1, none": (
        {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        "4:cpu:/a\n",
        None,
    ),
    "no groups": ({}, "", None),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_is_the_least_of_the_groups(case: str, tmp_path: Path):
    files, own, expected = QUOTAS[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "own").write_text(own)
    assert cores.cpu_quota(tmp_path, tmp_path / "own") == expected


def test_threads_are_no_more_than_the_quota(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cores, "usable_cores", lambda: {100_000, 100_001, 100_002, 100_003})
    monkeypatch.setattr(cores, "cpu_quota", lambda: 3)
    assert (cores.physical_cores(), cores.session_threads(None)) == (3, 3)
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert (cores.physical_cores(), cores.session_threads(None)) == (4, 0)


@pytest.mark.parametrize(
    ("quota", "threads", "whole"), [(0.5, 1, 1), (1.5, 2, 1), (3.0, 3, 3), (9.0, 4, 4), (None, 4, 4)]
)
def test_a_part_of_a_processor_may_have_a_thread_but_is_no_whole_one(
    quota: float | None, threads: int, whole: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cores, "usable_cores", lambda: {100_000, 100_001, 100_002, 100_003})
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert (cores.physical_cores(), cores.whole_processors()) == (threads, whole)


def test_threads_are_the_default_only_where_all_processors_may_be_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cores, "physical_cores", lambda: 2)
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    monkeypatch.setattr(cores, "usable_cores", lambda: {0, 1, 2, 3})
    assert (cores.session_threads(None), cores.session_threads(3)) == (0, 3)
    monkeypatch.setattr(cores, "usable_cores", lambda: {0, 1})
    assert (cores.session_threads(None), cores.session_threads(3)) == (2, 3)


@pytest.mark.xdist_group("qwen3_from_qwen2")
@pytest.mark.skipif(
    not HAS_AFFINITY or len(cores.usable_cores()) < 2, reason="needs two processors, and a system that tells them"
)
def test_an_engine_stays_on_the_processors_of_its_process(recorded_bundle: Callable[[str], Path]):
    graph = recorded_bundle("qwen3_from_qwen2") / "graphs" / "receiver.onnx"
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_PROCESSOR, str(graph)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == {"True"}


@pytest.mark.parametrize("num_threads", [0, -1, 999_999])
def test_more_threads_than_processors_are_refused(num_threads: int):
    with pytest.raises(
        UsageError,
        match=rf"--threads is {num_threads}, expected 1 to {len(cores.usable_cores())}, the processors that this",
    ):
        cores.check_threads("--threads", num_threads)
    cores.check_threads("--threads", 1)
