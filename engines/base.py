"""The interface that every engine implements: I/O specs, device buffers, and runs over views into buffers.

The runtime owns all buffers. It allocates each once through the engine's `Device`, binds views of them by name, which
checks them, and runs the binding as often as it likes; an engine never copies a cache. Where an input and an output are
to be the same cache, the caller binds the same view to both.

Who owns what: the caller owns the buffers, and keeps them as long as a binding of views into them is run. A binding
belongs to the caller too, holds what its backend prepared for it (a prepared I/O binding, a captured graph) and no
buffer. An engine keeps no binding.

A `Device` is also a queue: copies and runs are carried out in the order of the calls, and on a GPU a call may return
before its work is done. Each model has a device of its own, all over the same memory, so that the sharers and the
receiver can work at the same time; an `Event` of one device that another waits for joins them.

Not covered: making engines of portable graphs (`engines.lowering` for ONNX Runtime, then `engines.trt.build`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from c2c_export.bundle import TensorSpec
from c2c_export.errors import C2CError

Array = NDArray[np.generic]
BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class View:
    """A contiguous piece of a buffer: what is bound to a graph's input or output.

    It does not keep the buffer alive: whoever makes views keeps their buffers as long as any binding of them is run.
    """

    pointer: int
    """Address of the first element on the device."""
    shape: tuple[int, ...]
    dtype: str
    """numpy's name, such as "float32"; or "bfloat16", which numpy lacks."""
    device: str
    """ONNX Runtime's name of the device type: "cpu" or "cuda"."""


class Buffer(ABC):
    """Memory on a device, of one dtype and shape, zeroed when allocated, freed when no longer referenced.

    Host arrays have the buffer's dtype, except that "bfloat16" is read as float32 (exactly) and written from float32
    (rounded to nearest even), since numpy has no such type. Copies that are only kept for later have the dtype of
    `storage_dtype`, and every bit.
    """

    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def view(self, *index: int, shape: tuple[int, ...] | None = None) -> View:
        """The contiguous part at `index` of the leading dimensions, seen as `shape` (default: the dimensions left).

        `shape` may hold fewer elements than the part does; it then covers the first of them.
        """

    def read(self, *index: int | slice) -> Array:
        """A copy on the host of the part at `index`; waits for all that was queued before it."""
        return loaded(self.read_stored(*index), self.dtype)

    def write(self, value: Array, *index: int | slice) -> None:
        """Queue a copy of a host array of the same shape into the part at `index`; `value` may change afterwards."""
        self.write_stored(stored(value, self.dtype), *index)

    @abstractmethod
    def read_stored(self, *index: int | slice) -> Array:
        """As `read`, as the elements lie in memory: bfloat16 as its 16 bits."""

    @abstractmethod
    def write_stored(self, value: Array, *index: int | slice) -> None:
        """As `write`, of elements as they lie in memory. Raises `ValueError` for another dtype than `storage_dtype`."""

    @abstractmethod
    def copy_from(self, source: "Buffer", *index: int | slice) -> None:
        """Queue a copy of the part of `source` at `index` into the first elements of this buffer, of the same dtype.

        Queued on this buffer's device. Nothing passes through the host. Raises `ValueError` when dtypes differ or the
        part does not fit.
        """


class Event(ABC):
    """A mark in a device's queue, reached when everything queued before it is done."""

    @abstractmethod
    def seconds_since(self, earlier: "Event") -> float:
        """Seconds between `earlier` and this mark being reached, both of one device; waits for this one."""


class Device(ABC):
    """Memory for an engine's buffers, and the queue of the work on them."""

    memory: ClassVar[str]
    """Where its buffers lie, as `View.device` says it."""

    @abstractmethod
    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A zeroed buffer. Raises `C2CError` when the device's memory does not suffice."""

    @abstractmethod
    def record(self) -> Event:
        """A mark behind all that was queued so far."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Let what is queued from now on begin only when `event`, of any device, is reached; returns at once."""


class Binding:
    """Views that an engine has checked and prepared for runs; made by its `bind`, and run by it alone.

    It may be run any number of times. It does not keep the buffers of its views alive; their contents may change from
    run to run, their addresses may not.
    """


class Engine(ABC):
    """One graph, ready to run.

    Not thread-safe: one `run` at a time per engine. Different engines may run at the same time.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: Device
    aliases: Mapping[str, str] = MappingProxyType({})
    """For each output that must be bound to the address of an input, that input's name."""
    address_alignment: int = 1
    """What every bound address must be a multiple of, in bytes; so must the size of a slot, where there are several."""

    def bind(self, views: Mapping[str, View]) -> Binding:
        """Check the views and prepare runs over them; nothing runs.

        `views` names every input and output of the graph, each once; an input and an output that are the same cache
        share a view. Raises `ValueError` when a name is missing or unknown, when dtype or shape disagree with the
        graph's, when a view lies on another device than the engine's, or an output of `aliases` elsewhere than its
        input; and `C2CError` when an address is not aligned or no profile of the engine holds the shapes.
        """
        specs = {spec.name: spec for spec in (*self.inputs, *self.outputs)}
        if views.keys() != specs.keys():
            wrong = sorted(views.keys() ^ specs.keys())
            raise ValueError(f"bindings and the graph's inputs and outputs differ in {', '.join(wrong)}")
        for name, view in views.items():
            _check_view(specs[name], view)
            if view.device != self.device.memory:
                raise ValueError(f"{name} is bound to {view.device} memory, expected {self.device.memory}")
            if view.pointer % self.address_alignment:
                raise C2CError(misaligned(f"{name} of shape {list(view.shape)}", self.address_alignment))
        for output, source in self.aliases.items():
            if views[output].pointer != views[source].pointer:
                raise ValueError(f"{output} and {source} are one cache, but are bound to different addresses")
        return self._bind(views)

    @abstractmethod
    def run(self, binding: Binding) -> None:
        """Queue one run, which reads and writes the bound memory, on `device`. `Buffer.read` waits for its outputs.

        `binding` is one that this engine's `bind` gave. Raises `C2CError` when the backend cannot run it.
        """

    @abstractmethod
    def _bind(self, views: Mapping[str, View]) -> Binding:
        """Prepare runs over views that were checked."""


def misaligned(what: str, alignment: int) -> str:
    """The message for `what` that begins at no multiple of `alignment` bytes."""
    return (
        f"{what} does not begin at a multiple of {alignment} bytes, which this engine needs; export with a "
        "--max-length that is a multiple of 128, or open one slot only (num_slots=1)"
    )


def storage_dtype(dtype: str) -> np.dtype[np.generic]:
    """The numpy dtype of a buffer's elements in memory: bfloat16 is stored as its 16 bits, uint16."""
    return np.dtype("uint16" if dtype == BFLOAT16 else dtype)


def check_stored(value: Array, dtype: str) -> None:
    """Raise `ValueError` unless the elements of `value` are those that a buffer of `dtype` stores."""
    if value.dtype != storage_dtype(dtype):
        raise ValueError(f"an array of {value.dtype} for a {dtype} buffer, which stores {storage_dtype(dtype)}")


def stored(value: Array, dtype: str) -> Array:
    """`value` as a buffer of `dtype` stores it; bfloat16 is rounded to nearest even, NaN stays NaN."""
    if dtype != BFLOAT16:
        return np.asarray(value, dtype=dtype)
    single = np.asarray(value, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN's mantissa into infinity.
    return np.where(np.isnan(single), np.uint32(0x7FC0), rounded).astype(np.uint16)


def loaded(bits: Array, dtype: str) -> Array:
    """What a host reads of a buffer of `dtype` that stores `bits`; bfloat16 becomes float32."""
    if dtype != BFLOAT16:
        return bits
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _check_view(spec: TensorSpec, view: View) -> None:
    fits = len(view.shape) == len(spec.shape) and all(
        isinstance(expected, str) or found == expected for found, expected in zip(view.shape, spec.shape, strict=True)
    )
    if view.dtype != spec.dtype or not fits:
        raise ValueError(f"{spec.name}: bound {view.dtype} {view.shape}, the graph wants {spec.dtype} {spec.shape}")
