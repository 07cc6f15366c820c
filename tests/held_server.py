"""`c2c-export` with `serve`, whose answers end after their first token until a byte, or the end, of stdin comes.

As `decode_gate` does, in a process of its own; the arguments are the command line's.
"""

import os
import sys
import threading

from c2c_export import cli
from runtime.scheduler import Scheduler

_released = threading.Event()
_decode = Scheduler._decode


def _wait_for_release() -> None:
    # Not by `sys.stdin`, whose lock a thread must not hold when the interpreter ends.
    os.read(0, 1)
    _released.set()


Scheduler._decode = lambda self: _released.is_set() and _decode(self)  # type: ignore[method-assign]
threading.Thread(target=_wait_for_release, daemon=True).start()
cli.main(sys.argv[1:])
