"""The KV cache pool of one model: every buffer allocated once, each slot one contiguous view that is never copied.

A pool holds, for each cache of the model's graph, one buffer [slots,H,C,D]. A slot is one request's rows; its view
[1,H,C,D] is bound both as the graph's input `past_<name>` and as its output `<name>`. Neighbouring slots are one view
too, [n,H,C,D], for a step that serves them all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from c2c_export.bundle import TensorSpec
from c2c_export.errors import C2CError
from engines.base import Array, Buffer, Engine, View, misaligned, storage_dtype

_PAST = "past_"


class KVCachePool:
    """All caches of one model, by name ("key.<layer>", "value.<layer>"), for a fixed number of slots."""

    def __init__(self, engine: Engine, num_slots: int) -> None:
        """Allocate a buffer for every input of `engine` named `past_…`, [B,H,C,D] with static H, C, D.

        Raises `C2CError` when the slots do not begin where `engine` wants them, or memory does not suffice.
        """
        self.num_slots = num_slots
        self.row_bytes = cache_row_bytes(engine.inputs)
        """What one row of all caches takes in memory."""
        self._buffers: dict[str, Buffer] = {}
        self._in_place: dict[int, Mapping[str, View]] = {}
        for spec in engine.inputs:
            if spec.name.startswith(_PAST):
                shape = (num_slots, *(int(size) for size in spec.shape[1:]))
                self._buffers[spec.name.removeprefix(_PAST)] = allocate_slots(engine, spec.name, shape, spec.dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all caches."""
        return tuple(self._buffers)

    @property
    def slot_bytes(self) -> int:
        """What one slot of all caches takes in memory, at full capacity."""
        return sum(prod(buffer.shape[1:]) * storage_dtype(buffer.dtype).itemsize for buffer in self._buffers.values())

    def view(self, name: str, slot: int) -> View:
        """The view [1,H,C,D] of one cache's slot."""
        buffer = self._buffers[name]
        return buffer.view(slot, shape=(1, *buffer.shape[1:]))

    def in_place(self, slot: int) -> Mapping[str, View]:
        """Bindings of every cache of a slot, as input and as output; the same object every time."""
        if slot not in self._in_place:
            bindings = {}
            for name in self._buffers:
                bindings[name] = bindings[_PAST + name] = self.view(name, slot)
            self._in_place[slot] = bindings
        return self._in_place[slot]

    def range_in_place(self, slots: range) -> Mapping[str, View]:
        """Bindings, as input and as output, of every cache of neighbouring slots: [len(slots),H,C,D] each."""
        bindings = {}
        for name, buffer in self._buffers.items():
            bindings[name] = bindings[_PAST + name] = view_of_slots(buffer, slots)
        return bindings

    def read_rows(self, name: str, slot: int, start: int, stop: int) -> NDArray[np.float32]:
        """A host copy of the rows [start, stop) of one cache's slot: [H, stop - start, D]."""
        return self._buffers[name].read(slot, slice(None), slice(start, stop)).astype(np.float32, copy=False)

    def take_rows(self, names: Iterable[str], slot: int, start: int, stop: int) -> dict[str, Array]:
        """Host copies of the rows [start, stop) of a slot in these caches, [H, stop - start, D] each.

        As they lie in memory (bfloat16 as its 16 bits), so that `put_rows` gives the same bits.
        """
        return {name: self._buffers[name].read_stored(slot, slice(None), slice(start, stop)) for name in names}

    def put_rows(self, slot: int, start: int, rows: Mapping[str, Array]) -> None:
        """Write rows that `take_rows` gave, [H, n, D] for each cache named, into the rows of a slot from `start` on.

        Raises `ValueError` for rows of an engine with another dtype.
        """
        for name, values in rows.items():
            self._buffers[name].write_stored(values, slot, slice(None), slice(start, start + values.shape[1]))

    def copy_rows(self, name: str, slot: int, start: int, stop: int, into: Buffer) -> None:
        """Copy the rows [start, stop) of one cache's slot, [H, stop - start, D], to the beginning of `into`."""
        into.copy_from(self._buffers[name], slot, slice(None), slice(start, stop))


def view_of_slots(buffer: Buffer, slots: range) -> View:
    """The view [len(slots), …] of neighbouring slots along the first dimension of `buffer`."""
    if not 0 <= slots.start < slots.stop <= buffer.shape[0]:
        raise ValueError(f"slots {slots.start} to {slots.stop - 1} of {buffer.shape[0]}")
    return replace(buffer.view(slots.start), shape=(len(slots), *buffer.shape[1:]))


def cache_row_bytes(inputs: Iterable[TensorSpec]) -> int:
    """Bytes of one row of all caches, keys and values, of a decoder's graph with these `inputs`."""
    return sum(
        prod(int(size) for size in (spec.shape[1], spec.shape[3])) * storage_dtype(spec.dtype).itemsize
        for spec in inputs
        if spec.name.startswith(_PAST)
    )


def allocate_slots(engine: Engine, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
    """A buffer of which each slot, along the first dimension of `shape`, is bound to the input `name` by itself.

    Raises `C2CError` when there are several and they do not begin at addresses that `engine` takes.
    """
    slot_bytes = prod(shape[1:]) * storage_dtype(dtype).itemsize
    if shape[0] > 1 and slot_bytes % engine.address_alignment:
        what = f"{name}: a slot of shape {list(shape[1:])} takes {slot_bytes} bytes, so that every slot but the first"
        raise C2CError(misaligned(what, engine.address_alignment))
    return engine.device.allocate(shape, dtype)
