"""The interface that every engine implements: I/O specs, device buffers, and `run` over views into buffers.

The runtime owns all buffers. It allocates each once through the engine's `Device`, binds views of them by name, and
runs; an engine never copies a cache. Where an input and an output are to be the same cache, the caller binds the same
view to both.

Not covered: building engines from portable graphs, which each backend does in its own `lower` or `build` module.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from c2c_export.bundle import TensorSpec

Array = NDArray[np.generic]


@dataclass(frozen=True)
class View:
    """A contiguous piece of a buffer: what is bound to a graph's input or output.

    It does not keep the buffer alive: whoever makes views keeps their buffers as long as any engine may run on them.
    """

    pointer: int
    """Address of the first element on the device."""
    shape: tuple[int, ...]
    dtype: str
    """numpy's name, such as "float32"."""
    device: str
    """ONNX Runtime's name of the device type: "cpu" or "cuda"."""


class Buffer(ABC):
    """Memory on a device, of one dtype and shape, zeroed when allocated, freed when no longer referenced."""

    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def view(self, *index: int, shape: tuple[int, ...] | None = None) -> View:
        """The contiguous part at `index` of the leading dimensions, seen as `shape` (default: the dimensions left).

        `shape` may hold fewer elements than the part does; it then covers the first of them.
        """

    @abstractmethod
    def read(self, *index: int | slice) -> Array:
        """A copy on the host of the part at `index`."""

    @abstractmethod
    def write(self, value: Array, *index: int | slice) -> None:
        """Copy a host array of the same shape into the part at `index`."""


class Device(ABC):
    """Where an engine's buffers live."""

    @abstractmethod
    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A zeroed buffer. Raises `C2CError` when the device's memory does not suffice."""


class Engine(ABC):
    """One graph, ready to run.

    Not thread-safe: one `run` at a time per engine. Different engines may run at the same time.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: Device

    def run(self, bindings: Mapping[str, View]) -> None:
        """Run once, reading and writing the bound memory. Returns when the outputs are there.

        `bindings` names every input and output of the graph, each once; an input and an output that are the same
        cache share a view. Raises `ValueError` when a name is missing or unknown, or when dtype or shape disagree
        with the graph's.
        """
        specs = {spec.name: spec for spec in (*self.inputs, *self.outputs)}
        if bindings.keys() != specs.keys():
            wrong = sorted(bindings.keys() ^ specs.keys())
            raise ValueError(f"bindings and the graph's inputs and outputs differ in {', '.join(wrong)}")
        for name, view in bindings.items():
            _check_view(specs[name], view)
        self._run(bindings)

    @abstractmethod
    def _run(self, bindings: Mapping[str, View]) -> None:
        """Run with bindings that were checked."""


def _check_view(spec: TensorSpec, view: View) -> None:
    fits = len(view.shape) == len(spec.shape) and all(
        isinstance(expected, str) or found == expected for found, expected in zip(view.shape, spec.shape, strict=True)
    )
    if view.dtype != spec.dtype or not fits:
        raise ValueError(f"{spec.name}: bound {view.dtype} {view.shape}, the graph wants {spec.dtype} {spec.shape}")
