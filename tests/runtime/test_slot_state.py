"""Which rows of a former prompt a further one goes on from, against a model of what every row depends on."""

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.prompt import ModelTokens
from runtime.slot_state import FusedRows, SlotState, Wide, find_reuse, reusable_sharer_rows


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
    reuse = find_reuse(state, target, Wide(), kept)
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
    reuse = find_reuse(state, state, Wide(), state.fused)
    assert reuse.num_rows == state.num_rows - 1
    assert reuse.num_sections == sum(section.stop < state.num_rows for section in state.fused)
    assert dict(reuse.sharer_rows) == {number: len(tokens.ids) for number, tokens in state.sharers.items()}


def tokens(*lengths: int) -> list[ModelTokens]:
    return [ModelTokens(np.arange(length), np.arange(length)) for length in lengths]


def lengths_of_pieces(row: int, stop: int, head_size: int) -> list[int]:
    """The pieces of ONNX Runtime's sums over a head, in a call that ends at row `stop`, with blocks of 64, 128 and 256.

    128 by 128 numbers are taken at once, or fewer rows and longer pieces.
    """
    lengths = []
    for size in (64, 128, 256):
        num_rows = min(size, stop - (row - row % size))
        room = next(room for room in (16, 32, 64, 128) if room >= min(num_rows, 128))
        lengths.append(min(128 * 128 // room, head_size))
    return lengths


HEAD_SIZES = (192, 256, 512)


@given(st.integers(2, 600), st.integers(2, 600), st.sampled_from(HEAD_SIZES))
def test_rows_of_a_sharer_with_wide_heads_are_reused_where_their_blocks_are_alike(
    first: int, second: int, head_size: int
):
    held, wanted = tokens(first, second)
    rows = reusable_sharer_rows(held, wanted, head_size)
    assert rows <= min(first, second) == reusable_sharer_rows(held, wanted, 0)

    def depends_on(num_rows: int, row: int) -> tuple[list[int], bool]:
        return lengths_of_pieces(row, num_rows, head_size), row == num_rows - 1 and num_rows % 16 == 1

    for row in range(rows):
        assert depends_on(first, row) == depends_on(second, row)
    if rows < min(first, second) and head_size <= 256:  # no more could be
        assert depends_on(first, rows) != depends_on(second, rows)


@st.composite
def two_long_states(draw: st.DrawFn) -> tuple[SlotState, SlotState]:
    """Two that begin alike, with sections that stop about the bounds of blocks."""
    bounds = st.sampled_from([2, 7, 15, 16, 17, 40, 63, 64, 65, 81, 127, 128, 129, 145, 161, 192, 193, 194, 256, 257])
    common = draw(st.integers(1, 270))
    cuts = draw(st.lists(bounds, min_size=0, max_size=2, unique=True))

    def one(own: int) -> SlotState:
        num_rows = draw(st.sampled_from([common + 1, common + 2])) + draw(st.integers(0, 140))
        ends = sorted({*cuts, draw(bounds)} if draw(st.booleans()) else cuts)
        ends = [end for end in ends if end <= num_rows]
        fused = tuple(FusedRows(start, stop, stop) for start, stop in itertools.pairwise([0, *ends]))
        last = ends[-1] if ends else 0
        row = np.where(np.arange(num_rows) < common, 1, own)
        sharers = {0: ModelTokens(row[:last], np.arange(last))} if fused else {}
        return SlotState(ModelTokens(row, np.arange(num_rows)), sharers, fused, closing=draw(st.booleans()))

    return one(2), one(3)


@settings(max_examples=1000, deadline=None)
@given(two_long_states(), st.sampled_from(HEAD_SIZES), st.booleans())
def test_with_wide_heads_rows_are_reused_that_any_cut_of_their_run_gives(
    states: tuple[SlotState, SlotState], head_size: int, keeps_unfused: bool
):
    state, target = states
    reuse = find_reuse(state, target, Wide(head_size), state.fused if keeps_unfused else ())
    narrow = find_reuse(state, target, Wide(), state.fused if keeps_unfused else ())
    assert reuse.num_sections == narrow.num_sections
    assert reuse.num_rows <= narrow.num_rows

    def run_of(row: int, state: SlotState) -> tuple[int, int]:
        stops = [0, *(section.stop for section in state.fused), state.num_rows + state.closing]
        return next(run for run in itertools.pairwise(stops) if run[0] <= row < run[1])

    def depends_on(row: int, state: SlotState) -> tuple[list[int], bool]:
        start, stop = run_of(row, state)
        return lengths_of_pieces(row, stop, head_size), row == stop - 1 and (stop - start) % 16 == 1

    for row in range(reuse.num_rows):
        assert depends_on(row, state) == depends_on(row, target)
    first, stop = run_of(reuse.num_rows, target)
    if reuse.num_rows > first:  # the rest of the run is computed in one call
        assert (stop - first) % 16 != 1
        assert (stop - reuse.num_rows) % 16 != 1


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 700), st.sampled_from(HEAD_SIZES))
def test_with_wide_heads_the_same_prompt_is_reused_but_for_two_rows_or_not_at_all(num_rows: int, head_size: int):
    state = SlotState(tokens(num_rows)[0])
    assert find_reuse(state, state, Wide(head_size)).num_rows == (0 if num_rows % 16 == 1 else num_rows - 2)


@given(states(), st.integers(1, 40), st.booleans())
def test_rows_of_generated_tokens_are_not_reused(state: SlotState, num_generated: int, wide: bool):
    grown = SlotState(state.receiver, state.sharers, state.fused, state.closing)
    for index in range(num_generated):
        grown.append(index, state.num_rows + index)
    longer = np.append(grown.receiver.ids, 9), np.append(grown.receiver.position_ids, grown.num_rows)
    target = SlotState(ModelTokens(*longer), state.sharers, state.fused)
    models = Wide(256 if wide else 0)
    assert find_reuse(grown, target, models, state.fused) == find_reuse(state, target, models, state.fused)


@given(states())
def test_nothing_is_reused_of_nothing(state: SlotState):
    reuse = find_reuse(SlotState(), state, Wide())
    assert (reuse.num_rows, reuse.num_sections) == (0, 0)
    assert not any(reuse.sharer_rows.values())
