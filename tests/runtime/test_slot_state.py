"""Which rows of a former prompt a further one goes on from, against a model of what every row depends on."""

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.prompt import ModelTokens
from runtime.slot_state import FusedRows, SlotState, find_reuse, reusable_sharer_rows


@dataclass(frozen=True)
class Value:
    """What a row's value depends on: equal values are equal rows."""

    of: object


def values_of(state: SlotState) -> tuple[list[Value], list[Value], dict[int, list[Value]]]:
    """By the definition: the unfused and the final value of every receiver row, and the value of every sharer row."""
    sharers = {
        number: [
            Value((number, tuple(tokens.ids[: row + 1]), tuple(tokens.position_ids[: row + 1]), len(tokens.ids) == 1))
            for row in range(len(tokens.ids))
        ]
        for number, tokens in state.sharers.items()
    }
    stops = [0, *(section.stop for section in state.fused), state.num_rows + state.closing]
    alone = {start for start, stop in itertools.pairwise(stops) if stop - start == 1}
    unfused: list[Value] = []
    final: list[Value] = []
    for row in range(state.num_rows):
        ended = [section for section in state.fused if section.stop <= row]
        seen = tuple(
            final[other] if any(section.start <= other < section.stop for section in ended) else unfused[other]
            for other in range(row)
        )
        # A row that is computed alone is rounded otherwise than one of several.
        own = (int(state.receiver.ids[row]), int(state.receiver.position_ids[row]), row in alone)
        unfused.append(Value((*own, seen)))
        final.append(unfused[row])
        for section in state.fused:
            if section.stop == row + 1:
                for fused in range(section.start, section.stop):
                    position = state.receiver.position_ids[fused]
                    read = tuple(
                        sharers[number][int(np.searchsorted(tokens.position_ids, position))]
                        for number, tokens in sorted(state.sharers.items())
                    )
                    final[fused] = Value((unfused[fused], read))
    return unfused, final, sharers


@st.composite
def states(draw: st.DrawFn) -> SlotState:
    """Few different tokens and few boundaries, so that two states often agree for a while."""
    num_rows = draw(st.integers(1, 9))
    ids = np.array(draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=num_rows, max_size=num_rows)))
    cuts = sorted(draw(st.sets(st.sampled_from([0, 2, 3, 5, 7, 9]), max_size=4)))
    cuts = [cut for cut in cuts if cut <= num_rows]
    fused = tuple(
        FusedRows(start, stop, stop)
        for index, (start, stop) in enumerate(itertools.pairwise(cuts))
        if index % 2 == 0 or draw(st.booleans())
    )
    numbers = draw(st.sampled_from([(0,), (0, 1)])) if fused else ()
    last = fused[-1].stop if fused else 0
    sharers = {}
    for number in numbers:
        sharer_ids = np.array(
            draw(st.lists(st.sampled_from([3, 3, 3, 4]), min_size=last, max_size=last)), dtype=np.int64
        )
        sharers[number] = ModelTokens(sharer_ids, np.arange(last))
    return SlotState(ModelTokens(ids, np.arange(num_rows)), sharers, fused, closing=draw(st.booleans()))


@given(states(), states(), st.data())
def test_what_is_reused_is_what_would_be_computed(state: SlotState, target: SlotState, data: st.DataObject):
    kept = data.draw(st.sets(st.sampled_from(state.fused))) if state.fused else set()
    reuse = find_reuse(state, target, kept)
    unfused, final, sharers = values_of(state)
    wanted_unfused, wanted_final, wanted_sharers = values_of(target)
    assert reuse.num_rows < target.num_rows
    for section in target.fused[: reuse.num_sections]:
        assert section.stop <= reuse.num_rows
        assert final[section.start : section.stop] == wanted_final[section.start : section.stop]
    done = target.fused[reuse.num_sections - 1].stop if reuse.num_sections else 0
    for row in range(done, reuse.num_rows):
        lost = any(section.start <= row < section.stop and section not in kept for section in state.fused)
        assert not lost
        assert unfused[row] == wanted_unfused[row]
    for number, num_rows in reuse.sharer_rows.items():
        assert sharers.get(number, [])[:num_rows] == wanted_sharers[number][:num_rows]


@given(states())
def test_the_same_prompt_is_reused_but_for_its_last_row(state: SlotState):
    reuse = find_reuse(state, state, state.fused)
    assert reuse.num_rows == state.num_rows - 1
    assert reuse.num_sections == sum(section.stop < state.num_rows for section in state.fused)
    assert dict(reuse.sharer_rows) == {number: len(tokens.ids) for number, tokens in state.sharers.items()}


def tokens(*lengths: int) -> list[ModelTokens]:
    return [ModelTokens(np.arange(length), np.arange(length)) for length in lengths]


@given(st.integers(2, 600), st.integers(2, 600))
def test_rows_of_a_sharer_with_wide_heads_are_reused_where_their_blocks_are_alike(first: int, second: int):
    held, wanted = tokens(first, second)
    rows = reusable_sharer_rows(held, wanted, wide=True)
    assert rows <= min(first, second) == reusable_sharer_rows(held, wanted, wide=False)

    def sums_are_cut(num_rows: int, row: int) -> bool:
        start = row - row % 128
        return min(num_rows - start, 128) > 64

    for row in range(rows):
        assert sums_are_cut(first, row) == sums_are_cut(second, row)
    if rows < min(first, second):  # no more could be
        assert sums_are_cut(first, rows) != sums_are_cut(second, rows)


@given(states())
def test_nothing_is_reused_of_nothing(state: SlotState):
    reuse = find_reuse(SlotState(), state)
    assert (reuse.num_rows, reuse.num_sections) == (0, 0)
    assert not any(reuse.sharer_rows.values())
