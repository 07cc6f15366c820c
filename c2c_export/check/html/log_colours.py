"""Steps of colour for positive numbers that span decades.

In: the numbers of a figure. Out: `LogColours`, at most `NUM_COLOURS` steps between round numbers. The colours
themselves are in the page's style, one class per step, so that dark mode can turn them around.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from c2c_export.check.html.numbers import short

NUM_COLOURS = 9
_MANTISSAS = ((1, 2, 5), (1, 3), (1,))
"""Round numbers of a decade, the finest first."""
_MIDDLE = NUM_COLOURS // 2


@dataclass(frozen=True)
class LogColours:
    """Edges of the steps, ascending: step i holds the numbers from `edges[i]` to below `edges[i + 1]`."""

    edges: Sequence[float]

    @classmethod
    def spanning(cls, values: Iterable[float]) -> Self:
        """The finest steps of round numbers that hold all positive finite `values`; none without such a value."""
        positive = [value for value in values if value > 0 and math.isfinite(value)]
        if not positive:
            return cls(())
        low, high = min(positive), max(positive)
        for mantissas in _MANTISSAS:
            edges = _edges(low, high, mantissas, 1)
            if len(edges) - 1 <= NUM_COLOURS:
                return cls(edges)
        decades = math.floor(math.log10(high)) - math.floor(math.log10(low)) + 1
        return cls(_edges(low, high, (1,), math.ceil(decades / (NUM_COLOURS - 1))))

    def css_class(self, value: float) -> str:
        """`step0` (smallest) to `step8`; `zero` and `unbounded` for what has no place on a logarithmic scale."""
        if not math.isfinite(value):
            return "unbounded"
        if value <= 0:
            return "zero"
        return self._step_class(bisect_right(self.edges, value) - 1)

    def legend(self) -> list[tuple[str, str]]:
        """Class and range of each step, such as `("step0", "1e-5 to 2e-5")`, the smallest first."""
        pairs = zip(self.edges, self.edges[1:], strict=False)
        return [(self._step_class(step), f"{short(low)} to {short(high)}") for step, (low, high) in enumerate(pairs)]

    def _step_class(self, step: int) -> str:
        steps = len(self.edges) - 1
        # Few steps are spread over all colours, so that the largest number has the strongest.
        return f"step{_MIDDLE if steps == 1 else round(step * (NUM_COLOURS - 1) / (steps - 1))}"


def _edges(low: float, high: float, mantissas: Sequence[int], every: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high)) + every
    # Read as text: 10.0**-5 is not the number that 1e-5 is, and 10.0**309 is an error, not infinity.
    edges = [float(f"{m}e{exponent}") for exponent in range(first - 1, last + 1, every) for m in mantissas]
    from_low = [edge for edge in edges if edge <= low][-1:] or [0.0]
    inside = [edge for edge in edges if low < edge <= high]
    beyond = [edge for edge in edges if edge > high][:1] or [math.inf]
    return [*from_low, *inside, *beyond]
