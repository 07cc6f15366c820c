"""Pages of mapped weights leave memory, which is seen in /proc/self/smaps, and their contents stay."""

import contextlib
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engines.ort.mapped_weights import let_go_of_mapped_weights

CONTENT = bytes(range(256)) * 4096  # 1 MiB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc/self/maps")


@contextlib.contextmanager
def mapped(path: Path, **how: int) -> Iterator[mmap.mmap]:
    """The file's memory, all of it resident."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(CONTENT)
    with path.open("r+b") as file:
        os.fsync(file.fileno())  # what is not on disk yet stays
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, **how) as memory:
        assert memory[:] == CONTENT
        assert resident_kib(path) == len(CONTENT) >> 10
        yield memory


def resident_kib(path: Path) -> int:
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.fixture
def system_lets_go(tmp_path: Path) -> None:
    """Skips where the system itself keeps such pages, as a kernel before 5.4 does, or a tmpfs."""
    path = tmp_path / "probe" / "a.data"
    with mapped(path, access=mmap.ACCESS_READ) as memory:
        with contextlib.suppress(OSError):
            memory.madvise(21)
        if resident_kib(path):
            pytest.skip("this system keeps pages of mapped files")


@pytest.mark.usefixtures("system_lets_go")
def test_weights_of_the_folder_leave_memory_and_others_stay(tmp_path: Path):
    folder, beside = tmp_path / "graphs of it", tmp_path / "graphs of it too"
    with (
        mapped(folder / "a.data", access=mmap.ACCESS_READ) as weights,
        mapped(beside / "a.data", access=mmap.ACCESS_READ),
    ):
        let_go_of_mapped_weights(folder)
        assert resident_kib(folder / "a.data") == 0
        assert resident_kib(beside / "a.data") == len(CONTENT) >> 10
        assert weights[:] == CONTENT


@pytest.mark.usefixtures("system_lets_go")
def test_a_folder_is_found_by_its_links_too(tmp_path: Path):
    with mapped(tmp_path / "folder" / "a.data", access=mmap.ACCESS_READ):
        (tmp_path / "link").symlink_to(tmp_path / "folder")
        let_go_of_mapped_weights(tmp_path / "link")
        assert resident_kib(tmp_path / "folder" / "a.data") == 0


def test_what_was_written_stays(tmp_path: Path):
    with mapped(tmp_path / "folder" / "a.data", access=mmap.ACCESS_COPY) as memory:
        memory[:3] = b"new"
        let_go_of_mapped_weights(tmp_path / "folder")
        assert memory[:3] == b"new"


LOADS_AT_ONCE = """
import sys, threading
from runtime import C2CPipeline

def load_and_answer():
    for _ in range(8):
        pipe = C2CPipeline.from_bundle(sys.argv[1], num_threads=1, num_slots=1, allow_unchecked=True)
        answers.add(tuple(pipe.generate("Hi", max_new_tokens=4, ignore_eos=True).token_ids))

answers = set()
threads = [threading.Thread(target=load_and_answer) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(answers))
"""


@pytest.mark.xdist_group("qwen3_from_llama_aligned")
def test_loading_in_one_thread_harms_nothing_of_another(recorded_bundle: Callable[[str], Path]):
    command = [sys.executable, "-c", LOADS_AT_ONCE, str(recorded_bundle("qwen3_from_llama_aligned"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
