"""What the rows of a slot hold, and which of them a further prompt can go on from, exactly.

A row of the receiver has two versions: *unfused*, as the receiver computed it, and *final*, after the fusers of its
section changed it (the same for a row that no section holds). A token attends to the final rows of the sections that
ended before it, and to the unfused rows of its own section (arXiv 2510.03215; the order is the reference's). So two
prompts have the same unfused rows as far as they have the same tokens at the same positions and the same fused sections
*ended*; that a section begins alike is no matter for its own rows.
"""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from runtime.prompt import ModelTokens, Plan

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
    closing: bool = False
    """Whether a row of padding was computed behind the prompt's last row."""
    _grown: ModelTokens = NO_TOKENS
    """What `receiver` was made by the last `append`: the beginning of `_room`."""
    _room: ModelTokens = NO_TOKENS

    @classmethod
    def of(cls, plan: Plan, computed: Collection[int]) -> "SlotState":
        """The rows that `plan` wants of the receiver and of those of its sharers that are `computed` at all.

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
        return cls(plan.receiver, sharers, tuple(fused), plan.closing_padding_id is not None)

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
class Reuse:
    """What of a state a target goes on from."""

    num_rows: int = 0
    """The receiver's leading rows whose unfused version is the one wanted; less than the target has."""
    num_sections: int = 0
    """The target's leading fused sections, all of whose rows are among these, whose final version is the one wanted."""
    sharer_rows: Mapping[int, int] = field(default_factory=dict)
    """Leading rows of each of the target's sharers."""


@dataclass(frozen=True)
class Wide:
    """Which models have heads so wide that a row's bits depend on how many rows are there (`ATTENTION_BLOCK`)."""

    receiver: bool = False
    sharers: frozenset[int] = frozenset()


ATTENTION_BLOCK = 128
"""Rows that ONNX Runtime's attention takes at once where heads are wider than 128, or a divisor or multiple of it.

Sums over wide heads are cut in two where a block has more than half as many rows, and are not where it has fewer. Rows
in blocks that are full do not depend on what follows.
"""


def find_reuse(
    state: SlotState, target: SlotState, unfused: Collection[FusedRows] = (), wide: Wide | None = None
) -> Reuse:
    """How far the rows of `state` are those that `target` wants, bit for bit, if they were prefilled.

    `unfused` are the fused sections of `state` whose rows are there in their unfused version too; of another one the
    rows are reused with the whole section or not at all. The last row is never reused: its logits are wanted.
    """
    wide = wide or Wide()
    sharer_rows = {
        number: reusable_sharer_rows(state.sharers.get(number, NO_TOKENS), tokens, wide=number in wide.sharers)
        for number, tokens in target.sharers.items()
    }
    same_sharers = state.sharers.keys() == target.sharers.keys()

    def fused_alike(section: FusedRows) -> bool:
        return (
            same_sharers
            and section in state.fused
            and section in target.fused
            and all(
                np.searchsorted(tokens.position_ids, section.stop_position) <= sharer_rows[number]
                for number, tokens in target.sharers.items()
            )
        )

    rows = min(_common_rows(state.receiver, target.receiver), len(target.receiver.ids) - 1)
    # A token that is a run by itself is computed otherwise than one of several.
    rows = min([rows, *(_single_rows(state) ^ _single_rows(target))])
    for section in sorted({*state.fused, *target.fused}, key=lambda section: section.start):
        if section.stop <= rows and fused_alike(section):
            continue
        lost = section in state.fused and section not in unfused
        rows = min(rows, section.start if lost else section.stop)
    alike = [section for section in target.fused if section.stop <= rows and fused_alike(section)]
    if wide.receiver:
        rows = max((section.stop for section in alike), default=0)
    return Reuse(rows, len(alike), sharer_rows)


def reusable_sharer_rows(held: ModelTokens, wanted: ModelTokens, *, wide: bool) -> int:
    """How many leading rows of a sharer that holds `held` are those of `wanted`, bit for bit."""
    num_held, num_wanted = len(held.ids), len(wanted.ids)
    rows = _common_rows(held, wanted)
    if num_held == num_wanted == rows:
        return rows
    if 1 in (num_held, num_wanted):  # a token that is read alone is computed otherwise than one of several
        return 0
    start = rows - rows % ATTENTION_BLOCK
    if wide and _wider_than_half(num_held - start) != _wider_than_half(num_wanted - start):
        return start
    return rows


def _wider_than_half(num_rows: int) -> bool:
    return num_rows > ATTENTION_BLOCK // 2


def _single_rows(state: SlotState) -> set[int]:
    """The rows that were a run by themselves: what is computed in one go, were it not cut."""
    stops = [0, *(section.stop for section in state.fused), state.num_rows + state.closing]
    return {start for start, stop in itertools.pairwise(stops) if stop - start == 1}


def _common_rows(old: ModelTokens, new: ModelTokens) -> int:
    """How many leading rows hold the same tokens at the same positions."""
    shorter = min(len(old.ids), len(new.ids))
    same = (old.ids[:shorter] == new.ids[:shorter]) & (old.position_ids[:shorter] == new.position_ids[:shorter])
    return shorter if bool(same.all()) else int(np.argmin(same))
