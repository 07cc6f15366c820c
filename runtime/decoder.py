"""Run a decoder graph, receiver or sharer, over one slot of its pool, or one token over each of neighbouring slots."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from c2c_export.errors import C2CError
from engines.base import Array, Binding, Buffer, Device, Engine, View
from runtime.cache import KVCachePool, allocate_slots, view_of_slots

Int64Array = NDArray[np.int64]
_WIDE = 128


class Decoder:
    """A receiver's or sharer's engine with its caches, the small buffers that feed it, and bindings of them.

    The graph is described in `c2c_export.trace.decoder`. The decoder owns the buffers and the bindings, of which it
    keeps one for each slot: that of a step of one token, so that a step does nothing for each layer; and one for each
    range of slots that `run_step` served. Not thread-safe.
    """

    def __init__(self, engine: Engine, num_slots: int, max_length: int, vocab_size: int | None = None) -> None:
        """Allocate everything. Raises `C2CError` when slots would not be aligned, or memory does not suffice.

        `vocab_size` is the number of ids that the model embeds; None is the number of logits, where there are any.
        """
        self._engine = engine
        self._vocab_size = vocab_size
        self.pool = KVCachePool(engine, num_slots)
        self._steps: dict[int, Binding] = {}
        self._shared_steps: dict[range, Binding] = {}
        self._max_length = max_length
        names = {spec.name for spec in engine.inputs}
        allocate = engine.device.allocate
        # A sharer of which only the first layer's values are read has no position_ids.
        self._by_token: dict[str, Buffer] = {
            name: allocate((max(max_length, num_slots),), "int64")
            for name in ("input_ids", "position_ids")
            if name in names
        }
        self._by_request: dict[str, Buffer] = {
            name: allocate((num_slots,), "int64")
            for name in ("write_index", "kv_length", "last_token")
            if name in names
        }
        self._row_position_ids: Buffer | None = None
        if "row_position_ids" in names:
            shape = (num_slots, max_length)
            self._row_position_ids = allocate_slots(engine, "row_position_ids", shape, "int64")
        self._logits: Buffer | None = None
        for spec in engine.outputs:
            if spec.name == "logits":
                self._logits = allocate((num_slots, int(spec.shape[2])), spec.dtype)
                self._vocab_size = vocab_size or int(spec.shape[2])

    @property
    def capacity(self) -> int:
        """Rows that each slot has."""
        return self._max_length

    @property
    def device(self) -> Device:
        """The device that `run` queues its work on."""
        return self._engine.device

    def run(
        self,
        slot: int,
        ids: Sequence[int] | Int64Array,
        position_ids: Sequence[int] | Int64Array,
        write_index: int,
        *,
        num_hidden: int = 0,
    ) -> None:
        """Queue the computation of S tokens, writing their keys and values into the slot's rows from `write_index` on.

        The last `num_hidden` tokens (closing padding) see the other rows, but no token sees them, nor do they see
        themselves; the next call writes over their rows. The last token's logits can be had from `logits`.
        Raises `C2CError` naming an id that the model does not embed.
        """
        num_tokens = len(ids)
        self._check_ids(ids)
        tokens: dict[str, Sequence[int] | Int64Array] = {"input_ids": ids, "position_ids": position_ids}
        for name, buffer in self._by_token.items():
            buffer.write(np.asarray(tokens[name], dtype=np.int64), slice(0, num_tokens))
        scalars = {
            "write_index": write_index,
            "kv_length": write_index + num_tokens - num_hidden,
            "last_token": num_tokens - 1,
        }
        for name, buffer in self._by_request.items():
            buffer.write(np.array([scalars[name]], dtype=np.int64), slice(0, 1))
        if self._row_position_ids is not None:
            rows = slice(write_index, write_index + num_tokens)
            self._row_position_ids.write(np.asarray(position_ids, dtype=np.int64), slot, rows)
        self._engine.run(self._binding(slot, num_tokens))

    def run_step(
        self,
        ids: Sequence[int] | Int64Array,
        position_ids: Sequence[int] | Int64Array,
        write_indices: Sequence[int] | Int64Array,
        first_slot: int = 0,
    ) -> None:
        """Queue one token for each of n neighbouring slots in one run of the engine; n is the length of all three.

        Token i is written into row `write_indices[i]` of slot `first_slot` + i, and sees that row and those before it.
        The tokens' logits can be had from `step_logits`. Raises `C2CError` naming an id that the model does not embed.
        """
        num_slots = len(ids)
        slots = range(first_slot, first_slot + num_slots)
        if num_slots < 1 or first_slot < 0 or slots.stop > self.pool.num_slots:
            raise ValueError(f"a step for slots {first_slot} to {slots.stop - 1} of a pool of {self.pool.num_slots}")
        self._check_ids(ids)
        rows = np.asarray(write_indices, dtype=np.int64)
        by_name = {
            "input_ids": np.asarray(ids, dtype=np.int64),
            "position_ids": np.asarray(position_ids, dtype=np.int64),
            "write_index": rows,
            "kv_length": rows + 1,
            "last_token": np.zeros(num_slots, dtype=np.int64),
        }
        for name, buffer in {**self._by_token, **self._by_request}.items():
            buffer.write(by_name[name], slice(0, num_slots))
        if self._row_position_ids is not None:
            for slot, row, position in zip(slots, rows, by_name["position_ids"], strict=True):
                self._row_position_ids.write(np.array([position]), slot, slice(int(row), int(row) + 1))
        if slots not in self._shared_steps:
            self._shared_steps[slots] = self._bind(slots, 1, self.pool.range_in_place(slots))
        self._engine.run(self._shared_steps[slots])

    @property
    def wide_head_size(self) -> int:
        """The size of heads that are wider than 128, else 0; see `runtime.slot_state.ATTENTION_BLOCK`."""
        sizes = [int(spec.shape[3]) for spec in self._engine.inputs if spec.name.startswith("past_")]
        widest = max(sizes, default=0)
        return widest if widest > _WIDE else 0

    def clear_rows(self, slot: int, num_rows: int) -> None:
        """Write zeros into the first rows of a slot: even a masked row of NaN makes others NaN in some engines."""
        first = self.pool.take_rows(self.pool.names, slot, 0, num_rows)
        self.pool.put_rows(slot, 0, {name: np.zeros_like(rows) for name, rows in first.items()})

    def put_rows(self, slot: int, position_ids: Int64Array, start: int, rows: Mapping[str, Array]) -> None:
        """Write rows that were computed before, [H, n, D] for each cache named, into a slot's rows from `start` on.

        `position_ids` [n] are those of their tokens.
        """
        self.pool.put_rows(slot, start, rows)
        if self._row_position_ids is not None:
            self._row_position_ids.write(position_ids, slot, slice(start, start + len(position_ids)))

    def _check_ids(self, ids: Sequence[int] | Int64Array) -> None:
        """An engine need not: looking up a row that an integer table does not have gives zeros."""
        if self._vocab_size is None:
            return
        array = np.asarray(ids, dtype=np.int64)
        outside = array[(array < 0) | (array >= self._vocab_size)]
        if outside.size:
            raise C2CError(f"token id {outside[0]}: expected ids from 0 to {self._vocab_size - 1}, those of the model")

    def _binding(self, slot: int, num_tokens: int) -> Binding:
        slots = range(slot, slot + 1)
        if num_tokens > 1:  # a prompt's length may never come again
            return self._bind(slots, num_tokens, self.pool.in_place(slot))
        if slot not in self._steps:
            self._steps[slot] = self._bind(slots, 1, self.pool.in_place(slot))
        return self._steps[slot]

    def _bind(self, slots: range, num_tokens: int, caches: Mapping[str, View]) -> Binding:
        """Bind `caches`, those of `slots`."""
        num_slots = len(slots)
        views = {name: buffer.view(shape=(num_slots, num_tokens)) for name, buffer in self._by_token.items()}
        views |= {name: buffer.view(shape=(num_slots,)) for name, buffer in self._by_request.items()}
        if self._row_position_ids is not None:
            views["row_position_ids"] = view_of_slots(self._row_position_ids, slots)
        if self._logits is not None:
            views["logits"] = self._logits.view(shape=(num_slots, 1, self._logits.shape[1]))
        return self._engine.bind({**views, **caches})

    def logits(self) -> NDArray[np.float32]:
        """A copy of the logits [V] of the last token of the last `run`, once it is done. Only a receiver has them."""
        assert self._logits is not None, "a sharer's graph has no logits"
        return self._logits.read(0).astype(np.float32, copy=False)

    def step_logits(self, num_slots: int) -> NDArray[np.float32]:
        """A copy of the logits [num_slots,V] of the last `run_step`, once it is done. Only a receiver has them."""
        assert self._logits is not None, "a sharer's graph has no logits"
        return self._logits.read(slice(0, num_slots)).astype(np.float32, copy=False)
