"""Run a fuser graph: correct the receiver's rows of one section from the sharer's, in place.

The graph is described in `c2c_export.trace.fuser`.
"""

import numpy as np
from numpy.typing import NDArray

from c2c_export.bundle import TensorSpec
from engines.base import Buffer, Engine, View
from runtime.cache import KVCachePool

_SHARER, _PAST, _UNFUSED = "sharer_", "past_", "unfused_"


class Fuser:
    """One sharer's fuser engine between the receiver's caches and the sharer's.

    It owns the small buffers that feed it. The caches are those of the pools that `run` is given, which bind them for
    that call only, as the number of rows differs from call to call. Not thread-safe.
    """

    def __init__(self, engine: Engine, max_length: int) -> None:
        self._engine = engine
        allocate = engine.device.allocate
        self._rows = {name: allocate((max_length,), "int64") for name in ("sharer_rows", "receiver_rows")}
        self._write_index = allocate((1,), "int64")
        self._unfused: dict[str, Buffer] = {}
        for spec in engine.inputs:
            if spec.name.startswith(_UNFUSED):
                _, num_heads, _, head_dim = spec.shape
                elements = int(num_heads) * int(head_dim) * max_length
                self._unfused[spec.name.removeprefix(_UNFUSED)] = allocate((elements,), spec.dtype)

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of the receiver's caches that it changes."""
        return tuple(spec.name for spec in self._engine.outputs)

    @property
    def sharer_caches(self) -> tuple[TensorSpec, ...]:
        """The caches of the sharer that it reads, [1,H,C,D] each."""
        return tuple(
            spec.model_copy(update={"name": spec.name.removeprefix(_SHARER)})
            for spec in self._engine.inputs
            if spec.name.startswith(_SHARER) and spec.name not in self._rows
        )

    @property
    def address_alignment(self) -> int:
        """As `Engine.address_alignment`."""
        return self._engine.address_alignment

    def keep_unfused(self, receiver: KVCachePool, slot: int, rows: range) -> None:
        """Keep the receiver's rows as they are now, before any fuser changes them, if the graph wants them.

        To be called for every fuser of a section before the first of them runs.
        """
        for name, buffer in self._unfused.items():
            receiver.copy_rows(name, slot, rows.start, rows.stop, into=buffer)

    def run(
        self,
        receiver: KVCachePool,
        sharer: KVCachePool,
        slot: int,
        receiver_rows: range,
        sharer_rows: NDArray[np.int64],
    ) -> None:
        """Queue the fusion of N rows of `slot`; `sharer_rows` [N] pairs with `receiver_rows`, one contiguous run."""
        num_rows = len(receiver_rows)
        self._rows["receiver_rows"].write(np.asarray(receiver_rows, dtype=np.int64), slice(0, num_rows))
        self._rows["sharer_rows"].write(sharer_rows, slice(0, num_rows))
        self._write_index.write(np.array([receiver_rows.start], dtype=np.int64), slice(None))
        views: dict[str, View] = {name: rows.view(shape=(num_rows,)) for name, rows in self._rows.items()}
        views["write_index"] = self._write_index.view()
        for spec in (*self._engine.inputs, *self._engine.outputs):
            if spec.name.startswith(_SHARER) and spec.name not in views:
                views[spec.name] = sharer.view(spec.name.removeprefix(_SHARER), slot)
            elif spec.name.startswith(_UNFUSED):
                _, num_heads, _, head_dim = spec.shape
                buffer = self._unfused[spec.name.removeprefix(_UNFUSED)]
                views[spec.name] = buffer.view(shape=(1, int(num_heads), num_rows, int(head_dim)))
            elif spec.name not in views:
                views[spec.name] = receiver.view(spec.name.removeprefix(_PAST), slot)
        self._engine.run(self._engine.bind(views))
