"""The pieces of a prefill: all of it, once, in order, and never cut where a result would depend on the cut."""

from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.prefill_work import AwaitSharer, FuseSection, Piece, PrefillReceiver, PrefillSharer, PrefillWork
from runtime.prompt import ModelTokens
from runtime.slot_state import FusedRows, Reuse, SlotState


@st.composite
def works(draw: st.DrawFn) -> tuple[SlotState, Reuse, bool]:
    """A target with sections, and a reuse that find_reuse could give."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    stops = np.cumsum(lengths).tolist()
    num_rows = stops[-1]
    first = draw(st.integers(0, 1))
    fused = tuple(
        FusedRows(start, stop, stop)
        for index, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True))
        if index % 2 == first
    )
    num_sharer_rows = fused[-1].stop if fused else 0
    tokens = ModelTokens(np.arange(num_sharer_rows), np.arange(num_sharer_rows))
    closing = draw(st.booleans())
    rows = ModelTokens(np.arange(num_rows), np.arange(num_rows))
    target = SlotState(rows, {0: tokens} if fused else {}, fused, closing)
    reused = draw(st.integers(0, num_rows - 1))
    num_sections = draw(st.integers(0, sum(section.stop <= reused for section in fused)))
    later = [section.stop for section in fused[num_sections:]]
    reused = min([reused, *later])
    rows = draw(st.integers(0, num_sharer_rows))
    return target, Reuse(reused, num_sections, {0: rows} if fused else {}), closing


def take_all(work: PrefillWork, sizes: Iterator[int | None]) -> list[Piece]:
    pieces = []
    while not work.done:
        pieces.append(work.take(next(sizes)))
    return pieces


@given(works(), st.lists(st.one_of(st.none(), st.integers(0, 40)), min_size=1, max_size=6))
def test_everything_that_is_left_is_computed_once_and_in_order(
    case: tuple[SlotState, Reuse, bool], sizes: list[int | None]
):
    target, reuse, closing = case
    work = PrefillWork(target, reuse)
    pieces = take_all(work, (sizes[index % len(sizes)] for index in range(10_000)))
    num_rows = target.num_rows + closing
    computed = {number: reuse.sharer_rows[number] for number in target.sharers}
    row, fused = reuse.num_rows, reuse.num_sections
    fused_to = 0
    for piece in pieces:
        match piece:
            case PrefillSharer():
                assert computed[piece.number] - 1 <= piece.start <= computed[piece.number]
                computed[piece.number] = piece.stop
            case PrefillReceiver():
                assert row - 1 <= piece.start <= row
                row = piece.stop
                # Sections that ended before it are fused; its own is not.
                assert all(section.stop > piece.start or index < fused for index, section in enumerate(target.fused))
                assert all(section.stop >= piece.stop for section in target.fused[fused:])
                assert piece.closing == (closing and piece.stop == num_rows)
            case FuseSection():
                section = target.fused[fused]
                assert piece.section == section
                assert section.stop <= row
                assert all(computed[number] >= section.stop for number in computed)
                assert piece.start == max(fused_to, section.start)
                fused_to = piece.stop
                fused += piece.stop == section.stop
    assert row == num_rows
    assert fused == len(target.fused)
    assert computed == {number: len(tokens.ids) for number, tokens in target.sharers.items()}


@given(works(), st.lists(st.one_of(st.none(), st.integers(0, 70)), min_size=1, max_size=6))
def test_no_call_computes_a_single_token_of_a_longer_run_or_leaves_one_for_the_last_block(
    case: tuple[SlotState, Reuse, bool], sizes: list[int | None]
):
    target, reuse, closing = case
    work = PrefillWork(target, reuse)
    stops = [section.stop for section in target.fused]
    for piece in take_all(work, (sizes[index % len(sizes)] for index in range(10_000))):
        length = piece.stop - piece.start
        if isinstance(piece, PrefillReceiver):
            run_start = max([stop for stop in stops if stop <= piece.start], default=0)
            run_stop = min([stop for stop in stops if stop >= piece.stop], default=target.num_rows + closing)
            run = run_stop - run_start
        elif isinstance(piece, FuseSection):
            run = piece.section.stop - piece.section.start
        else:
            assert isinstance(piece, PrefillSharer)
            run = len(target.sharers[piece.number].ids)
        assert length > 1 or run == 1
        assert isinstance(piece, FuseSection) or length == 1 or length % 16 != 1


@given(works())
def test_rows_from_elsewhere_are_awaited_only_where_they_are_first_fused(case: tuple[SlotState, Reuse, bool]):
    target, reuse, _ = case
    work = PrefillWork(target, reuse, awaited=target.sharers)
    pieces = take_all(work, (None for _ in range(1000)))
    assert not any(isinstance(piece, PrefillSharer) for piece in pieces)
    fusing = [index for index, piece in enumerate(pieces) if isinstance(piece, FuseSection)]
    awaiting = [index for index, piece in enumerate(pieces) if isinstance(piece, AwaitSharer)]
    assert awaiting == ([fusing[0] - 1] if fusing else [])


@given(works(), st.integers(2, 40))
def test_what_is_left_is_counted(case: tuple[SlotState, Reuse, bool], size: int):
    target, reuse, _ = case
    work = PrefillWork(target, reuse)
    while not work.done:
        before, following = work.num_rows_left, work.next
        piece = work.take(size)
        assert type(piece) is type(following)
        assert piece.start == following.start
        assert before - work.num_rows_left == piece.stop - piece.start
    assert work.num_rows_left == 0
