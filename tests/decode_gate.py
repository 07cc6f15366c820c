"""A gate before the decode steps of an engine, so that a test finds requests where it wants them, on any machine.

While it is closed, requests are planned, get slots and first tokens, and are aborted as ever; none is done unless its
first token is its last.
"""

from types import TracebackType
from typing import Self

from runtime.async_engine import AsyncC2CEngine


class DecodeGate:
    """Closed when it is made, until `open` or the end of its `with` block."""

    def __init__(self, engine: AsyncC2CEngine) -> None:
        self._engine = engine
        self._decode = engine._scheduler._decode
        engine._scheduler._decode = lambda: False  # type: ignore[method-assign]

    def open(self) -> None:
        self._engine._scheduler._decode = self._decode  # type: ignore[method-assign]
        self._engine._wake.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.open()
