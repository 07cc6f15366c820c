"""Prefill and fuse one slot according to a `Plan`, reusing the rows that are there already.

`runtime.prefill_work` says what is computed in which order, `runtime.slot_state` what is reused. Here the engines are
run, a piece at a time, so that a scheduler can do other work between pieces.

On a GPU the sharers and the receiver have queues of their own and compute at the same time; the receiver's queue waits
for a sharer's where a fuser first reads that sharer's rows.
"""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from c2c_export.errors import C2CError
from engines.base import Array, Device, Event
from runtime.decoder import Decoder, Int64Array
from runtime.fuser import Fuser
from runtime.kept_rows import CacheRows, KeptRows, SharerRows
from runtime.prefill_work import (
    AwaitSharer,
    FuseSection,
    Piece,
    PrefillReceiver,
    PrefillSharer,
    PrefillWork,
    RestoreReceiver,
    RestoreSharer,
)
from runtime.prompt import Plan
from runtime.row_keeper import RowKeeper
from runtime.slot_state import FusedRows, Reuse, SlotState, Wide, find_reuse

_Span = tuple[Event, Event]


@dataclass(frozen=True)
class PrefillTimings:
    """Seconds that the devices spent in each phase; on a GPU the first two overlap, and so do several sharers."""

    sharer_prefill: float
    receiver_prefill: float
    fuse: float


class Prefiller:
    """The engines of a bundle, over one pool of slots."""

    def __init__(self, receiver: Decoder, sharers: Mapping[int, Decoder], fusers: Mapping[int, Fuser]) -> None:
        """`sharers` and `fusers` lack the sharers whose gates are all closed: nothing is computed for them."""
        self.receiver = receiver
        self.sharers = sharers
        self.fusers = fusers
        self.wide = Wide(
            receiver.wide_head_size,
            {number: sharer.wide_head_size for number, sharer in sharers.items() if sharer.wide_head_size},
        )
        """Which models' rows depend on the blocks that they are computed in."""

    def target(self, plan: Plan) -> SlotState:
        """The rows that `plan` wants."""
        return SlotState.of(plan, self.fusers.keys())

    def run(self, slot: int, state: SlotState, plan: Plan) -> "Prefill":
        """Bring `slot` from `state` to `plan`, updating `state`; afterwards the receiver's logits are the prompt's.

        Returns the prefill, done. If it raises, the slot's rows are neither those of `state` nor those of `plan`.
        """
        target = self.target(plan)
        prefill = Prefill(self, slot, plan, find_reuse(state, target, self.wide))
        try:
            while not prefill.done:
                prefill.advance()
        except BaseException:
            prefill.clear()
            raise
        state.receiver, state.sharers = target.receiver, target.sharers
        state.fused, state.closing, state.num_generated = target.fused, target.closing, 0
        return prefill

    def clear(self, slot: int, state: SlotState) -> None:
        """Write zeros into a slot that holds `state`: rows that are masked must be finite (`Decoder.clear_rows`)."""
        self.clear_rows(slot, state.num_rows, {number: len(tokens.ids) for number, tokens in state.sharers.items()})

    def clear_rows(self, slot: int, num_rows: int, sharer_rows: Mapping[int, int]) -> None:
        """Write zeros into so many rows of the receiver and of each sharer."""
        # One more, which a decode step may have written.
        self.receiver.clear_rows(slot, min(num_rows + 1, self.receiver.capacity))
        for number, num_sharer_rows in sharer_rows.items():
            self.sharers[number].clear_rows(slot, num_sharer_rows)

    def is_finite(self, slot: int, state: SlotState) -> bool:
        """Whether all rows of a slot that holds `state` are: the last one is not where one before it is not."""
        pool, stop = self.receiver.pool, state.num_rows
        return all(np.isfinite(pool.read_rows(name, slot, max(0, stop - 1), stop)).all() for name in pool.names)


class Prefill:
    """One prefill under way. Its slot's rows are those that its plan wants when it is done, and not before.

    The receiver's logits are the prompt's from the piece on that `gives_logits` until the receiver runs anything else.
    """

    def __init__(
        self,
        prefiller: Prefiller,
        slot: int,
        plan: Plan,
        reuse: Reuse,
        *,
        begun_with: KeptRows | None = None,
        keep_rows: bool = False,
        sharer_rows: Mapping[int, "Future[SharerRows]"] | None = None,
    ) -> None:
        """The slot's rows are those that `reuse` says, or are made so from what was kept, `begun_with`.

        With `keep_rows` the rows of each section are copied before they are fused, for `row_keeper`. `sharer_rows` are
        rows that are computed elsewhere; those of sharers that compute nothing here are ignored.
        """
        self._prefiller, self._slot, self._plan, self._reuse = prefiller, slot, plan, reuse
        self._target = prefiller.target(plan)
        self._awaited = {
            number: sharer_rows[number]
            for number, tokens in self._target.sharers.items()
            if sharer_rows and number in sharer_rows and reuse.sharer_rows[number] < len(tokens.ids)
        }
        self._work = PrefillWork(
            self._target, reuse, restore=begun_with is not None, awaited=self._awaited, wide=prefiller.wide
        )
        self._keeps_rows = keep_rows
        self._begun_with = begun_with
        self._unfused: dict[FusedRows, dict[str, Array]] = {}
        self._last_span: _Span | None = None
        self._sharer_spans: list[_Span] = []
        self._receiver_spans: list[_Span] = []
        self._fuse_spans: list[_Span] = []
        self._unfinished: list[Event] = []
        self._incomplete = False
        self._written_rows = 0
        self._written_sharer_rows: dict[int, int] = {}
        self.num_reused_rows = reuse.num_rows
        """The receiver's rows that were there already, or were put back."""
        self.num_rows = reuse.num_rows if begun_with is None else 0
        """The receiver's rows that are there by now; those beyond may be written over meanwhile."""

    @property
    def done(self) -> bool:
        """Whether the slot holds what the plan wants."""
        return self._work.done

    @property
    def next_piece(self) -> Piece:
        """What `advance` does next; not to be asked when done."""
        return self._work.next

    def gives_logits(self, piece: Piece) -> bool:
        """Whether a piece that was just run left the prompt's logits in the receiver."""
        num_rows = self._target.num_rows + self._target.closing
        return isinstance(piece, PrefillReceiver) and piece.stop == num_rows

    @property
    def num_rows_left(self) -> int:
        """Rows that are still to be put back or computed, of all models and fusers."""
        return self._work.num_rows_left

    @property
    def waiting(self) -> bool:
        """Whether the next piece needs rows that are computed elsewhere and are not there yet."""
        if self.done:
            return False
        piece = self._work.next
        return isinstance(piece, AwaitSharer) and not self._awaited[piece.number].done()

    def advance(self, max_rows: int | None = None) -> Piece:
        """Run the next piece, about `max_rows` of it at most, and return what was run.

        Waits for rows that are computed elsewhere where `waiting`. Raises what their future raises, and `C2CError`
        when an engine fails; the slot's rows are lost then.
        """
        piece = self._work.take(max_rows)
        self._note_written(piece)
        match piece:
            case RestoreSharer():
                with self._timed(self._prefiller.sharers[piece.number].device):
                    self._restore_sharer(piece)
            case RestoreReceiver():
                with self._timed(self._prefiller.receiver.device):
                    self._restore_receiver(piece)
                self.num_rows = piece.stop
            case AwaitSharer():
                self._write_sharer(self._awaited[piece.number].result(), piece.number)
            case PrefillSharer():
                self._prefill_sharer(piece)
            case PrefillReceiver():
                with self._timed(self._prefiller.receiver.device, self._receiver_spans):
                    self._prefill_receiver(piece)
                self.num_rows = max(self.num_rows, piece.stop)
            case FuseSection():
                device = self._prefiller.receiver.device
                while self._unfinished:
                    device.wait(self._unfinished.pop())
                if self._keeps_rows:
                    self._keep_unfused(piece)
                with self._timed(device, self._fuse_spans):
                    self._fuse(range(piece.start, piece.stop))
        return piece

    def timings(self) -> PrefillTimings:
        """What each phase took so far; waits for the devices."""
        spans = (self._sharer_spans, self._receiver_spans, self._fuse_spans)
        return PrefillTimings(*(sum(stop.seconds_since(start) for start, stop in phase) for phase in spans))

    def seconds_of_last_piece(self) -> float:
        """What the device spent on the last piece; waits for it."""
        if self._last_span is None:
            return 0.0
        start, stop = self._last_span
        return stop.seconds_since(start)

    def row_keeper(self) -> RowKeeper | None:
        """What copies the slot's rows out of it, once it holds what the plan wants; None if they are not to be kept.

        Rows that were handed over are not kept where they lack caches that a further prompt of the sharer needs.
        """
        if not self._keeps_rows or self._incomplete:
            return None
        unfused: dict[FusedRows, CacheRows] = dict(self._begun_with.unfused) if self._begun_with is not None else {}
        unfused |= self._unfused
        pools = {number: self._prefiller.sharers[number].pool for number in self._target.sharers}
        return RowKeeper(self._slot, self._target, self._prefiller.receiver.pool, pools, unfused)

    def clear(self) -> None:
        """Write zeros into what was written so far: rows that are masked must be finite (`Decoder.clear_rows`)."""
        self._prefiller.clear_rows(self._slot, self._written_rows, self._written_sharer_rows)

    def _note_written(self, piece: Piece) -> None:
        match piece:
            case RestoreReceiver() | PrefillReceiver():
                self._written_rows = max(self._written_rows, piece.stop)
            case RestoreSharer() | PrefillSharer():
                before = self._written_sharer_rows.get(piece.number, 0)
                self._written_sharer_rows[piece.number] = max(before, piece.stop)
            case AwaitSharer():
                self._written_sharer_rows[piece.number] = len(self._target.sharers[piece.number].ids)

    def _restore_receiver(self, piece: RestoreReceiver) -> None:
        kept = self._kept
        self._put_receiver_rows(kept.receiver, first=0, piece=piece)
        final = kept.state.fused[: self._reuse.num_sections]
        for section, rows in kept.unfused.items():
            if section not in final:
                self._put_receiver_rows(rows, first=section.start, piece=piece)

    def _put_receiver_rows(self, rows: CacheRows, first: int, piece: RestoreReceiver) -> None:
        """Write what `rows`, of which the first is the prompt's row `first`, has of a piece."""
        num_rows = next((cache.shape[1] for cache in rows.values()), 0)
        start, stop = max(first, piece.start), min(first + num_rows, piece.stop)
        if start < stop:
            part = {name: cache[:, start - first : stop - first] for name, cache in rows.items()}
            self._prefiller.receiver.put_rows(self._slot, self._target.receiver.position_ids[start:stop], start, part)

    def _restore_sharer(self, piece: RestoreSharer) -> None:
        rows = slice(piece.start, piece.stop)
        part = {name: cache[:, rows] for name, cache in self._kept.sharers[piece.number].items()}
        self._put_sharer_rows(piece.number, piece.start, self._target.sharers[piece.number].position_ids[rows], part)

    @property
    def _kept(self) -> KeptRows:
        assert self._begun_with is not None
        return self._begun_with

    def _put_sharer_rows(self, number: int, start: int, position_ids: Int64Array, rows: CacheRows) -> None:
        sharer = self._prefiller.sharers[number]
        # An interrupted prefill may have left a fuser that still reads the rows that are written now.
        sharer.device.wait(self._prefiller.receiver.device.record())
        sharer.put_rows(self._slot, position_ids, start, rows)
        self._unfinished.append(sharer.device.record())

    def _prefill_sharer(self, piece: PrefillSharer) -> None:
        sharer, tokens = self._prefiller.sharers[piece.number], self._target.sharers[piece.number]
        # An interrupted prefill may have left a fuser that still reads the rows that are written now.
        sharer.device.wait(self._prefiller.receiver.device.record())
        rows = slice(piece.start, piece.stop)
        with self._timed(sharer.device, self._sharer_spans):
            sharer.run(self._slot, tokens.ids[rows], tokens.position_ids[rows], piece.start)
        self._unfinished.append(sharer.device.record())

    def _write_sharer(self, rows: SharerRows, number: int) -> None:
        sharer, tokens = self._prefiller.sharers[number], self._target.sharers[number]
        num_rows = len(tokens.ids)
        if (
            rows.number != number
            or not np.array_equal(rows.tokens.ids[:num_rows], tokens.ids)
            or not np.array_equal(rows.tokens.position_ids[:num_rows], tokens.position_ids)
        ):
            raise C2CError(f"the rows handed over for sharer {number} are not those of this prompt")
        read = {name: cache[:, :num_rows] for name, cache in rows.rows.items()}
        self._incomplete |= read.keys() != set(sharer.pool.names)
        self._put_sharer_rows(number, 0, tokens.position_ids, read)

    def _prefill_receiver(self, piece: PrefillReceiver) -> None:
        tokens, plan = self._target.receiver, self._plan
        stop = piece.stop - piece.closing
        ids, position_ids = tokens.ids[piece.start : stop], tokens.position_ids[piece.start : stop]
        if piece.closing:
            assert plan.closing_padding_id is not None
            ids = np.append(ids, plan.closing_padding_id)
            position_ids = np.append(position_ids, plan.num_positions - 1)
        self._prefiller.receiver.run(self._slot, ids, position_ids, piece.start, num_hidden=int(piece.closing))

    def _fuse(self, rows: range) -> None:
        target = self._target
        positions = target.receiver.position_ids[rows.start : rows.stop]
        pool = self._prefiller.receiver.pool
        for number in sorted(target.sharers):
            self._prefiller.fusers[number].keep_unfused(pool, self._slot, rows)
        for number in sorted(target.sharers):
            sharer_rows: Int64Array = np.searchsorted(target.sharers[number].position_ids, positions).astype(np.int64)
            sharer_pool = self._prefiller.sharers[number].pool
            self._prefiller.fusers[number].run(pool, sharer_pool, self._slot, rows, sharer_rows)

    def _keep_unfused(self, piece: FuseSection) -> None:
        """Copy a piece's rows before they are fused; the prompt is not kept where there is no memory for it."""
        section = piece.section
        changed = {name for number in self._target.sharers for name in self._prefiller.fusers[number].changed}
        try:
            read = self._prefiller.receiver.pool.take_rows(sorted(changed), self._slot, piece.start, piece.stop)
            if section not in self._unfused:
                num_rows = section.stop - section.start
                self._unfused[section] = {
                    name: np.empty((rows.shape[0], num_rows, rows.shape[2]), rows.dtype) for name, rows in read.items()
                }
        except MemoryError:
            self._keeps_rows = False
            return
        for name, rows in read.items():
            self._unfused[section][name][:, piece.start - section.start : piece.stop - section.start] = rows

    @contextlib.contextmanager
    def _timed(self, device: Device, spans: list[_Span] | None = None) -> Iterator[None]:
        """Time the last piece, and count it to a phase's `spans`, if it is of one."""
        start = device.record()
        yield
        self._last_span = (start, device.record())
        if spans is not None:
            spans.append(self._last_span)
