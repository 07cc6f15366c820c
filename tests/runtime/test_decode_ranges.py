"""Which slots a decode step serves in one call."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.decode_ranges import StepSlot, decode_ranges

CAPACITY = 50


@given(
    st.sets(st.integers(0, 15), min_size=1),
    st.lists(st.integers(0, CAPACITY), min_size=16, max_size=16),
    st.one_of(st.none(), st.integers(1, 8)),
)
def test_every_wanted_slot_is_served_once_and_nothing_else_is_written_over(
    wanted_slots: set[int], rows: list[int], max_slots: int | None
):
    wanted = {slot: StepSlot(100 + slot, slot, 7) for slot in wanted_slots}
    spare = {slot: row for slot, row in enumerate(rows) if slot not in wanted}
    served: list[int] = []
    for slots, step in decode_ranges(wanted, spare, CAPACITY, max_slots):
        assert max_slots is None or len(slots) <= max_slots
        assert len(step) == len(slots)
        assert slots.start in wanted
        assert slots[-1] in wanted
        for slot, token in zip(slots, step, strict=True):
            if slot in wanted:
                served.append(slot)
                assert token == wanted[slot]
            else:
                assert token == StepSlot(0, 0, spare[slot])
                assert token.row < CAPACITY
    assert served == sorted(wanted)


def test_neighbours_are_one_call_and_far_slots_are_two():
    def step(*slots: int) -> list[range]:
        wanted = {slot: StepSlot(1, 1, 1) for slot in slots}
        return [served for served, _ in decode_ranges(wanted, dict.fromkeys(range(16), 0), CAPACITY)]

    assert step(0, 1, 2) == [range(3)]
    assert step(2, 5) == [range(2, 6)]
    assert step(0, 15) == [range(1), range(15, 16)]


def test_a_full_slot_between_is_not_computed():
    wanted = {slot: StepSlot(1, 1, 1) for slot in (0, 2)}
    assert [slots for slots, _ in decode_ranges(wanted, {1: CAPACITY}, CAPACITY)] == [range(1), range(2, 3)]
