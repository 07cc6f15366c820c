"""Freed memory goes back to the system, which is seen in the resident size of a process of its own."""

import platform
import subprocess
import sys

import pytest

# Small blocks come from the heap, and one that is kept at its end would hold all of them.
SCRIPT = """
import ctypes, re
from pathlib import Path
from runtime.freed_memory import return_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(2000) for _ in range(100_000)]
for block in blocks:
    ctypes.memset(block, 1, 2000)
last = libc.malloc(2000)
for block in blocks:
    libc.free(ctypes.c_void_p(block))
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps it")
def test_freed_memory_is_returned_though_a_later_block_is_in_use():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150  # MiB, of 190
