"""Run a fuser graph: correct the receiver's rows of one section from the sharer's, in place.

The graph is described in `c2c_export.trace.fuser`.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engines.base import Buffer, Engine, View
from runtime.cache import KVCachePool

_SHARER, _PAST, _UNFUSED = "sharer_", "past_", "unfused_"


class Fuser:
    """One sharer's fuser engine between the receiver's caches and the sharer's. Not thread-safe."""

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
    def unfused_names(self) -> frozenset[str]:
        """The receiver caches of which `run` wants the rows as they were before any fuser; empty if it wants none."""
        return frozenset(self._unfused)

    def run(
        self,
        receiver: KVCachePool,
        sharer: KVCachePool,
        slot: int,
        receiver_rows: range,
        sharer_rows: NDArray[np.int64],
        unfused: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Fuse N rows of `slot`; `sharer_rows` [N] pairs with `receiver_rows`, one contiguous run.

        `unfused` holds the receiver's rows [H,N,D] from before any fuser, for every name in `unfused_names`.
        """
        num_rows = len(receiver_rows)
        self._rows["receiver_rows"].write(np.asarray(receiver_rows, dtype=np.int64), slice(0, num_rows))
        self._rows["sharer_rows"].write(sharer_rows, slice(0, num_rows))
        self._write_index.write(np.array([receiver_rows.start], dtype=np.int64), slice(None))
        bindings: dict[str, View] = {name: rows.view(shape=(num_rows,)) for name, rows in self._rows.items()}
        bindings["write_index"] = self._write_index.view()
        for spec in (*self._engine.inputs, *self._engine.outputs):
            if spec.name.startswith(_SHARER) and spec.name not in bindings:
                bindings[spec.name] = sharer.view(spec.name.removeprefix(_SHARER), slot)
            elif spec.name.startswith(_UNFUSED):
                bindings[spec.name] = self._bind_unfused(spec.name.removeprefix(_UNFUSED), unfused)
            elif spec.name not in bindings:
                bindings[spec.name] = receiver.view(spec.name.removeprefix(_PAST), slot)
        self._engine.run(bindings)

    def _bind_unfused(self, name: str, unfused: Mapping[str, NDArray[np.float32]]) -> View:
        rows, buffer = unfused[name], self._unfused[name]
        buffer.write(rows.reshape(-1), slice(0, rows.size))
        return buffer.view(shape=(1, *rows.shape))
