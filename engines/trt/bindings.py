"""What a TensorRT execution context has to be told before a run, and which runs are captured; computed without a GPU.

In: the engine's optimisation profiles and the views that the runtime binds. Out: the profile to run in, the addresses
and shapes that differ from those of the last run, and whether to capture the run. Not covered: calling TensorRT, which
`engines.trt.engine` does, and checking the views, which `engines.base` does.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from c2c_export.errors import C2CError
from engines.base import View

# In bytes: what cudaMalloc gives and TensorRT's own allocations have. That less suffices is documented nowhere.
ADDRESS_ALIGNMENT = 256

Shape = tuple[int, ...]
Action = Literal["enqueue", "capture"]


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: the smallest and largest shape of every input."""

    index: int
    smallest: Mapping[str, Shape]
    largest: Mapping[str, Shape]

    def misfit(self, shapes: Mapping[str, Shape]) -> str | None:
        """The first input whose shape lies outside, or None."""
        for name, shape in shapes.items():
            low, high = self.smallest[name], self.largest[name]
            if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return name
        return None

    @property
    def is_decode(self) -> bool:
        """Whether it holds steps of one token only: the shapes that come again and again with the same addresses."""
        return self.largest.get("input_ids", (0, 0))[-1] == 1


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> Profile:
    """The profile that holds `shapes`; where several do, as for one token of one request, the decode profile.

    Raises `C2CError` naming an input and its ranges when none does.
    """
    fitting = [profile for profile in profiles if profile.misfit(shapes) is None]
    if fitting:
        return max(fitting, key=lambda profile: profile.is_decode)
    name = next(filter(None, (profile.misfit(shapes) for profile in profiles)))
    ranges = ", ".join(f"{list(profile.smallest[name])} to {list(profile.largest[name])}" for profile in profiles)
    raise C2CError(
        f"no profile of this engine holds {name} of shape {list(shapes[name])}: they hold {ranges}; "
        "build the engine again with profiles that do"
    )


@dataclass
class BoundTensors:
    """What an execution context is told before a run: the address of every tensor, and the shape of every input."""

    addresses: Mapping[str, int]
    shapes: Mapping[str, Shape]
    was_queued: bool = False
    """Whether it has been run, other than from a graph."""


def bound_tensors(views: Mapping[str, View], input_names: Iterable[str]) -> BoundTensors:
    """The addresses of all `views` and the shapes of those that are inputs; an output's follows from these."""
    return BoundTensors(
        {name: view.pointer for name, view in views.items()}, {name: views[name].shape for name in input_names}
    )


@dataclass(frozen=True)
class Changes:
    """What an execution context is still to be told."""

    addresses: Mapping[str, int]
    shapes: Mapping[str, Shape]


@dataclass
class BindingState:
    """What one execution context was told last, and whether its runs are captured."""

    is_capturable: bool
    _addresses: dict[str, int] = field(default_factory=dict)
    _shapes: dict[str, Shape] = field(default_factory=dict)

    def changes(self, bound: BoundTensors) -> Changes:
        """What of `bound` differs from what was last given to `apply`."""
        return Changes(
            {name: address for name, address in bound.addresses.items() if self._addresses.get(name) != address},
            {name: shape for name, shape in bound.shapes.items() if self._shapes.get(name) != shape},
        )

    def apply(self, changes: Changes) -> None:
        """Note that the context was told `changes`."""
        self._addresses.update(changes.addresses)
        self._shapes.update(changes.shapes)

    def action(self, bound: BoundTensors, changes: Changes) -> Action:
        """What to do for a run over `bound` that no graph was captured of yet.

        A run is captured when the same binding comes the second time: the first run of new shapes may prepare things
        that a capture does not allow, so after a change of shapes a run is only queued.
        """
        if self.is_capturable and bound.was_queued and not changes.shapes:
            return "capture"
        bound.was_queued = True
        return "enqueue"
