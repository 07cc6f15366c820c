"""What a TensorRT execution context has to be told before a run, and which runs are captured; computed without a GPU.

In: the engine's optimisation profiles and the views that the runtime binds. Out: the profile to run in, the addresses
and shapes that differ from those of the last run, and whether to capture the run. Not covered: calling
TensorRT, which `engines.trt.engine` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from c2c_export.errors import C2CError
from engines.base import View

# What cudaMalloc gives and TensorRT's own allocations have. That less suffices is documented nowhere.
ADDRESS_ALIGNMENT = 256

Shape = tuple[int, ...]
Key = tuple[tuple[str, int, Shape], ...]
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


def check_addresses(bindings: Mapping[str, View], aliases: Mapping[str, str]) -> None:
    """Check what TensorRT takes for granted.

    `aliases` names for each output that is updated in place the input it shares memory with. Raises `ValueError` when
    the two have different addresses, or a tensor is not in GPU memory, and `C2CError` when an address is not aligned.
    """
    for output, source in aliases.items():
        if bindings[output].pointer != bindings[source].pointer:
            raise ValueError(f"{output} and {source} are one cache, but are bound to different addresses")
    for name, view in bindings.items():
        if view.device != "cuda":
            raise ValueError(f"{name} is bound to {view.device} memory, expected cuda")
        if view.pointer % ADDRESS_ALIGNMENT:
            raise C2CError(
                f"{name} of shape {list(view.shape)} does not begin at a multiple of {ADDRESS_ALIGNMENT} bytes, which "
                "TensorRT needs; export with a --max-length that is a multiple of 128, or open one slot only"
            )


def key_of(bindings: Mapping[str, View]) -> Key:
    """What a captured graph depends on: every tensor's address and shape."""
    return tuple((name, view.pointer, view.shape) for name, view in sorted(bindings.items()))


@dataclass(frozen=True)
class Changes:
    """What an execution context is still to be told."""

    addresses: Mapping[str, int]
    shapes: Mapping[str, Shape]


@dataclass
class BindingState:
    """What one execution context was told last, and which of its bindings it has run over."""

    input_names: Sequence[str]
    is_capturable: bool
    _addresses: dict[str, int] = field(default_factory=dict)
    _shapes: dict[str, Shape] = field(default_factory=dict)
    _seen: set[Key] = field(default_factory=set)

    def changes(self, bindings: Mapping[str, View]) -> Changes:
        """The addresses, and of the inputs the shapes, that differ from those last given to `apply`."""
        shapes = {name: bindings[name].shape for name in self.input_names}
        return Changes(
            {name: view.pointer for name, view in bindings.items() if self._addresses.get(name) != view.pointer},
            {name: shape for name, shape in shapes.items() if self._shapes.get(name) != shape},
        )

    def apply(self, changes: Changes) -> None:
        """Note that the context was told `changes`."""
        self._addresses.update(changes.addresses)
        self._shapes.update(changes.shapes)

    def action(self, key: Key, changes: Changes) -> Action:
        """What to do for a run over the bindings of `key` that no graph was captured of yet.

        A run is captured when the same bindings come the second time: the first run of new shapes may prepare things
        that a capture does not allow, so after a change of shapes a run is only queued.
        """
        if not self.is_capturable:
            return "enqueue"
        if key in self._seen and not changes.shapes:
            return "capture"
        self._seen.add(key)
        return "enqueue"
