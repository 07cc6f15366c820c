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
    num_generated: int = 0
    """The receiver's rows behind the prompt's: of generated tokens, each computed by itself."""
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

    @property
    def num_prompt_rows(self) -> int:
        """Those of them that are the prompt's."""
        return self.num_rows - self.num_generated

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
        self.num_generated += 1


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
    """Head sizes of the models whose heads are so wide that a row's bits depend on how many rows are there.

    `ATTENTION_BLOCK` says how.
    """

    receiver: int = 0
    """0 where they are not wide."""
    sharers: Mapping[int, int] = field(default_factory=dict)


ATTENTION_BLOCK = 128
"""Rows that ONNX Runtime's attention takes at once where heads are wider than 128, or a divisor or multiple of it.

A sum over a wide head is cut in two where a block has more than half as many rows, and is not where it has fewer.
Blocks begin at multiples of this, wherever a call begins; so the rows in blocks that are full do not depend on what
follows.
"""
_CUT_IN_TWO = 256
"""Sums over wider heads are cut into more pieces, by other numbers of rows."""

_SMALLEST_BLOCK = 16
"""What the number of a call's tokens that are taken at once is a multiple of. A last one by itself rounds otherwise."""


def find_reuse(state: SlotState, target: SlotState, wide: Wide, unfused: Collection[FusedRows] = ()) -> Reuse:
    """How far the rows of `state` are those that `target` wants, bit for bit, if they were prefilled.

    `unfused` are the fused sections of `state` whose rows are there in their unfused version too; of another one the
    rows are reused with the whole section or not at all. Rows of generated tokens are not reused: a token by itself
    rounds otherwise than a prompt's. Nor is the target's last row: its logits are wanted.
    """
    sharer_rows = {
        number: reusable_sharer_rows(state.sharers.get(number, NO_TOKENS), tokens, wide.sharers.get(number, 0))
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

    rows = min(_common_rows(state.receiver, target.receiver), state.num_prompt_rows, target.num_rows - 1)
    # A token that is a run by itself is computed otherwise than one of several.
    rows = min([rows, *(_single_rows(state) ^ _single_rows(target))])
    for section in sorted({*state.fused, *target.fused}, key=lambda section: section.start):
        if section.stop <= rows and fused_alike(section):
            continue
        lost = section in state.fused and section not in unfused
        rows = min(rows, section.start if lost else section.stop)
    alike = [section for section in target.fused if section.stop <= rows and fused_alike(section)]
    if wide.receiver:
        rows = _reusable_wide_rows(rows, max((section.stop for section in alike), default=0), state, target, wide)
    return Reuse(rows, len(alike), sharer_rows)


def reusable_sharer_rows(held: ModelTokens, wanted: ModelTokens, wide_head_size: int) -> int:
    """How many leading rows of a sharer that holds `held` are those of `wanted`, bit for bit.

    `wide_head_size` is the sharer's where its heads are wide, else 0.
    """
    num_held, num_wanted = len(held.ids), len(wanted.ids)
    rows = _common_rows(held, wanted)
    if num_held == num_wanted == rows:
        return rows
    if 1 in (num_held, num_wanted):  # a token that is read alone is computed otherwise than one of several
        return 0
    return _rows_computed_alike(rows, 0, num_held, num_wanted, wide_head_size) if wide_head_size else rows


def _reusable_wide_rows(rows: int, first: int, state: SlotState, target: SlotState, wide: Wide) -> int:
    """Those of the first `rows` common rows to go on from with wide heads; the run of the last begins at row `first`.

    What is left of that run is computed in one call (`runtime.prefill_work`), which must not take its last token by
    itself where the whole run in one call would not, and the other way round.
    """
    if rows == first:
        return rows
    stop = _stop_of_run(target, first)
    rows = _rows_computed_alike(rows, first, _stop_of_run(state, first), stop, wide.receiver)
    if rows in (first, stop):
        return rows
    if takes_one_alone(stop - first):
        return first
    return rows - takes_one_alone(stop - rows)


def _rows_computed_alike(rows: int, first: int, stop: int, other_stop: int, head_size: int) -> int:
    """How many of the first `rows` do not depend on whether their run, from row `first` on, ends at one stop or other.

    For a model with wide heads. Rows before `first` are of earlier runs, and do not.
    """
    if stop == other_stop:
        return rows
    for end in (stop, other_stop):
        if takes_one_alone(end - first):
            rows = min(rows, end - 1)
    start = rows - rows % ATTENTION_BLOCK
    if _cut_alike(stop - start, other_stop - start, head_size):
        return rows
    return max(first, start)


def _cut_alike(num_rows: int, other: int, head_size: int) -> bool:
    """Whether sums over a head are cut alike in blocks that would have so many rows, were they never full."""
    return head_size <= _CUT_IN_TWO and (num_rows > ATTENTION_BLOCK // 2) == (other > ATTENTION_BLOCK // 2)


def takes_one_alone(num_tokens: int) -> bool:
    """Whether a call of so many tokens may take its last one by itself."""
    return num_tokens % _SMALLEST_BLOCK == 1


def _stops_of_runs(state: SlotState) -> list[int]:
    """Where the receiver's runs of rows end: what is computed in one go, were it not cut."""
    return [*(section.stop for section in state.fused), state.num_prompt_rows + state.closing]


def _stop_of_run(state: SlotState, first: int) -> int:
    return next(stop for stop in _stops_of_runs(state) if stop > first)


def _single_rows(state: SlotState) -> set[int]:
    """The rows that were a run by themselves."""
    stops = [0, *_stops_of_runs(state)]
    return {start for start, stop in itertools.pairwise(stops) if stop - start == 1}


def _common_rows(old: ModelTokens, new: ModelTokens) -> int:
    """How many leading rows hold the same tokens at the same positions."""
    shorter = min(len(old.ids), len(new.ids))
    same = (old.ids[:shorter] == new.ids[:shorter]) & (old.position_ids[:shorter] == new.position_ids[:shorter])
    return shorter if bool(same.all()) else int(np.argmin(same))
