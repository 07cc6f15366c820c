"""Prefill and fuse one slot according to a `Plan`, reusing the rows that a former plan left there.

Sharers are prefilled in one call each, up to the last fused token: their rows never change. The receiver is prefilled
up to the end of each fused section, whose rows are then fused before the next section attends to them (arXiv
2510.03215; the order is the reference's).

On a GPU the sharers and the receiver have queues of their own and compute at the same time; the receiver's queue waits
for a sharer's where a fuser first reads that sharer's rows.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from engines.base import Device, Event
from runtime.decoder import Decoder, Int64Array
from runtime.fuser import Fuser
from runtime.prompt import ModelTokens, Plan

_Span = tuple[Event, Event]

_FIRST_ROOM = 64
NO_TOKENS = ModelTokens(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class FusedRows:
    """A fused section as rows [start, stop) of the receiver, and the position behind its last one."""

    start: int
    stop: int
    stop_position: int
    """Exclusive: rows of sharers at this position and later are not read for the section."""


@dataclass
class SlotState:
    """What the rows of a slot hold: tokens by row, for the receiver and each sharer, and which rows are fused."""

    receiver: ModelTokens = NO_TOKENS
    sharers: dict[int, ModelTokens] = field(default_factory=dict)
    fused: tuple[FusedRows, ...] = ()
    _grown: ModelTokens = NO_TOKENS
    """What `receiver` was made by the last `append`: the beginning of `_room`."""
    _room: ModelTokens = NO_TOKENS

    @property
    def num_rows(self) -> int:
        """The receiver's real rows."""
        return len(self.receiver.ids)

    def append(self, token_id: int, position_id: int) -> None:
        """Record one more unfused receiver row, a generated token's; O(1), as room doubles where it ends.

        Arrays that `receiver` had before stay as they are.
        """
        num_rows = self.num_rows
        if self.receiver is not self._grown or num_rows == len(self._room.ids):
            padding = (0, max(num_rows, _FIRST_ROOM))
            self._room = ModelTokens(np.pad(self.receiver.ids, padding), np.pad(self.receiver.position_ids, padding))
        self._room.ids[num_rows], self._room.position_ids[num_rows] = token_id, position_id
        stop = num_rows + 1
        self._grown = self.receiver = ModelTokens(self._room.ids[:stop], self._room.position_ids[:stop])


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
        self._receiver = receiver
        self.sharers = sharers
        self._fusers = fusers

    def run(self, slot: int, state: SlotState, plan: Plan) -> PrefillTimings:
        """Bring `slot` from `state` to `plan`, updating `state`; afterwards the receiver's logits are the prompt's.

        If it raises, the slot's rows are neither those of `state` nor those of `plan`.
        """
        target = _state_of(plan, self._fusers.keys())
        reusable_sharer_rows = {
            number: _common_rows(state.sharers.get(number, NO_TOKENS), tokens)
            for number, tokens in target.sharers.items()
        }
        first_row = _reusable_rows(state, target, reusable_sharer_rows)

        sharer_spans: list[_Span] = []
        receiver_spans: list[_Span] = []
        fuse_spans: list[_Span] = []
        device = self._receiver.device
        unfinished: list[Event] = []
        for number, tokens in target.sharers.items():
            done = reusable_sharer_rows[number]
            if done < len(tokens.ids):
                sharer = self.sharers[number]
                # An interrupted call may have left a fuser that still reads the rows that are written now.
                sharer.device.wait(device.record())
                with _timed(sharer.device, sharer_spans):
                    sharer.run(slot, tokens.ids[done:], tokens.position_ids[done:], done)
                unfinished.append(sharer.device.record())

        for section in target.fused:
            if section.stop > first_row:
                with _timed(device, receiver_spans):
                    self._prefill_receiver(slot, target.receiver, first_row, section.stop)
                while unfinished:
                    device.wait(unfinished.pop())
                with _timed(device, fuse_spans):
                    self._fuse(slot, target, section)
                first_row = section.stop
        with _timed(device, receiver_spans):
            self._prefill_receiver(slot, target.receiver, first_row, len(target.receiver.ids), closing_padding_of=plan)
        timings = PrefillTimings(_seconds(sharer_spans), _seconds(receiver_spans), _seconds(fuse_spans))
        state.receiver, state.sharers, state.fused = target.receiver, target.sharers, target.fused
        return timings

    def _prefill_receiver(
        self, slot: int, tokens: ModelTokens, start: int, stop: int, closing_padding_of: Plan | None = None
    ) -> None:
        ids, position_ids, num_hidden = tokens.ids[start:stop], tokens.position_ids[start:stop], 0
        if closing_padding_of is not None and closing_padding_of.closing_padding_id is not None:
            ids = np.append(ids, closing_padding_of.closing_padding_id)
            position_ids = np.append(position_ids, closing_padding_of.num_positions - 1)
            num_hidden = 1
        if len(ids):
            self._receiver.run(slot, ids, position_ids, start, num_hidden=num_hidden)

    def _fuse(self, slot: int, target: SlotState, section: FusedRows) -> None:
        rows = range(section.start, section.stop)
        positions = target.receiver.position_ids[section.start : section.stop]
        selected = sorted(target.sharers)
        pool = self._receiver.pool
        for number in selected:
            self._fusers[number].keep_unfused(pool, slot, rows)
        for number in selected:
            sharer_rows: Int64Array = np.searchsorted(target.sharers[number].position_ids, positions).astype(np.int64)
            self._fusers[number].run(pool, self.sharers[number].pool, slot, rows, sharer_rows)


@contextlib.contextmanager
def _timed(device: Device, spans: list[_Span]) -> Iterator[None]:
    start = device.record()
    yield
    spans.append((start, device.record()))


def _seconds(spans: list[_Span]) -> float:
    return sum(stop.seconds_since(start) for start, stop in spans)


def _state_of(plan: Plan, computed: Collection[int]) -> SlotState:
    """The rows that `plan` wants of the receiver and of those of its sharers that are computed at all.

    With none of them no section is fused, and the prompt, gaps and all, is computed like one that is not fused.
    Sharer tokens behind the last fused position are left out: nothing reads them.
    """
    selected = {number: tokens for number, tokens in plan.sharers.items() if number in computed}
    fused = []
    for section in plan.sections:
        if section.fused and selected:
            start, stop = np.searchsorted(plan.receiver.position_ids, (section.start, section.stop))
            fused.append(FusedRows(int(start), int(stop), section.stop))
    last_position = fused[-1].stop_position if fused else 0
    sharers = {}
    for number, tokens in selected.items():
        num_rows = int(np.searchsorted(tokens.position_ids, last_position))
        sharers[number] = ModelTokens(tokens.ids[:num_rows], tokens.position_ids[:num_rows])
    return SlotState(plan.receiver, sharers, tuple(fused))


def _common_rows(old: ModelTokens, new: ModelTokens) -> int:
    """How many leading rows hold the same tokens at the same positions."""
    shorter = min(len(old.ids), len(new.ids))
    same = (old.ids[:shorter] == new.ids[:shorter]) & (old.position_ids[:shorter] == new.position_ids[:shorter])
    return shorter if bool(same.all()) else int(np.argmin(same))


def _reusable_rows(state: SlotState, target: SlotState, sharer_rows: Mapping[int, int]) -> int:
    """How many leading receiver rows of `state` are exactly those that `target` wants.

    A fused section is reused whole or not at all, since its tokens attend to each other's unfused rows, and only if its
    sharers read the same up to its end. The last row is always computed again, for its logits.
    """
    rows = min(_common_rows(state.receiver, target.receiver), len(target.receiver.ids) - 1)
    same_sharers = state.sharers.keys() == target.sharers.keys()
    for section in sorted({*state.fused, *target.fused}, key=lambda section: section.start):
        covered = same_sharers and all(
            np.searchsorted(tokens.position_ids, section.stop_position) <= sharer_rows[number]
            for number, tokens in target.sharers.items()
        )
        if not (section in state.fused and section in target.fused and section.stop <= rows and covered):
            rows = min(rows, section.start)
    return rows
