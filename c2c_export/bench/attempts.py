"""Parts of a benchmark that may fail, or be interrupted, without costing what was measured before.

In: a part's name and its work. Out: what the work gave, or None and a line in `Attempts.problems`.
"""

from collections.abc import Callable
from typing import TypeVar

from c2c_export.errors import C2CError, reason_of

_Result = TypeVar("_Result")


class Attempts:
    """What failed so far, and whether the user interrupted the benchmark: after that nothing more is tried."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.interrupted = False

    def attempt(self, what: str, work: Callable[[], _Result]) -> _Result | None:
        """The result of `work`; None where it raised whatever, or was not tried after an interrupt."""
        if self.interrupted:
            return None
        try:
            return work()
        except KeyboardInterrupt:
            self.interrupted = True
            self.problems.append(f"{what}: interrupted")
        except C2CError as error:
            self.problems.append(f"{what}: {error}")
        except Exception as error:
            name, reason = type(error).__name__, reason_of(error)
            self.problems.append(f"{what}: {name}" if reason == name else f"{what}: {name}: {reason}")
        return None
