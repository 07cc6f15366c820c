"""Show a build in the terminal: our steps, and within each the phases that TensorRT reports.

In: descriptions of steps, and the calls of `engines.trt.build.BuildProgress`, from any thread. Out: bars that vanish
when done and one line per step with its duration; without a terminal, lines only.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

Step = Callable[[str], AbstractContextManager[object]]
"""Called with a description; the work that it describes is done inside the returned context."""

_MAX_DEPTH = 2
"""Phases nested deeper are not shown: TensorRT reports some thousands of them, each over in an instant."""


@contextlib.contextmanager
def show_step(
    console: Console, description: str, animation: Callable[[], AbstractContextManager[object]]
) -> Iterator[None]:
    """Show a long step while it runs, and how long it took; `animation` makes what moves on a terminal meanwhile."""
    started = time.perf_counter()
    if not console.is_terminal:
        console.print(f"{description} …", highlight=False, markup=False)
    with animation() if console.is_terminal else contextlib.nullcontext():
        yield
    console.print(f"{description}: {time.perf_counter() - started:.1f} s", highlight=False, markup=False)


class BuildDisplay:
    """A context that shows steps and phases on `console` while it is open; a `BuildProgress`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[int, TaskID]] = {}

    def __enter__(self) -> "BuildDisplay":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def step(self, description: str) -> AbstractContextManager[None]:
        """See `show_step`."""
        return show_step(self._console, description, lambda: self._bar(description))

    @contextlib.contextmanager
    def _bar(self, description: str) -> Iterator[None]:
        task = self._progress.add_task(escape(description), total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)

    def phase_started(self, phase: str, parent: str | None, num_steps: int) -> None:
        """See `BuildProgress`."""
        with self._lock:
            depth = 1 if parent is None else self._depth(parent) + 1
            if depth <= _MAX_DEPTH:
                task = self._progress.add_task("  " * depth + escape(phase), total=num_steps)
                self._phases[phase] = (depth, task)

    def step_finished(self, phase: str, step: int) -> None:
        """See `BuildProgress`."""
        with self._lock:
            if phase in self._phases:
                self._progress.update(self._phases[phase][1], completed=step + 1)

    def phase_finished(self, phase: str) -> None:
        """See `BuildProgress`."""
        with self._lock:
            if phase in self._phases:
                self._progress.remove_task(self._phases.pop(phase)[1])

    def stopping(self) -> None:
        """See `BuildProgress`."""
        self._console.print("stopping: waiting for TensorRT to finish its current step …", highlight=False)

    def _depth(self, phase: str) -> int:
        return self._phases[phase][0] if phase in self._phases else _MAX_DEPTH
