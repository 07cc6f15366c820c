"""Which kept prompts a further one is compared with, and which of them go; the rows themselves are not looked at."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import runtime.prefix_cache
from runtime.kept_rows import KeptRows
from runtime.prefix_cache import PrefixCache
from runtime.prompt import ModelTokens
from runtime.slot_state import Reuse, SlotState, Wide, find_reuse

ROW = np.zeros((1, 1, 4), dtype=np.float32)
SYSTEM = list(range(100, 130))


def cache(max_bytes: int = 10**9) -> PrefixCache:
    engines: Any = SimpleNamespace(wide=Wide(), receiver=SimpleNamespace(pool=SimpleNamespace(row_bytes=16)))
    return PrefixCache(engines, max_bytes)


def state(ids: Sequence[int], first_position: int = 0) -> SlotState:
    return SlotState(ModelTokens(np.array(ids), np.arange(len(ids)) + first_position))


def kept(ids: Sequence[int]) -> KeptRows:
    return KeptRows(state(ids), {"key.0": np.repeat(ROW, len(ids), axis=1)}, {}, {})


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[SlotState]:
    compared: list[SlotState] = []

    def count(old: SlotState, *arguments: Any) -> Reuse:
        compared.append(old)
        return find_reuse(old, *arguments)

    monkeypatch.setattr(runtime.prefix_cache, "find_reuse", count)
    return compared


def test_among_thousands_that_begin_alike_few_are_compared_and_the_longest_beginning_is_found(
    comparisons: list[SlotState],
):
    """Every prompt was compared with all that were kept: with 5,000 of them for 80 ms."""
    full = cache()
    for number in range(3000):
        full.add(kept([*SYSTEM, *[number] * 20]))
    assert len(full) == 3000
    comparisons.clear()
    found, reuse = full.find(state([*SYSTEM, *[5] * 30]))
    assert len(comparisons) <= 20
    assert found is not None
    assert found.state.receiver.ids.tolist() == [*SYSTEM, *[5] * 20]
    assert reuse.num_rows == len(SYSTEM) + 20
    assert full.find(state([*SYSTEM, 7000]))[1].num_rows == len(SYSTEM)
    assert full.find(state([7000, *SYSTEM])) == (None, Reuse())
    assert full.find(state([*SYSTEM, 7000], first_position=1)) == (None, Reuse())
    assert full.find(state([1])) == (None, Reuse())


def test_a_prompt_takes_the_place_of_its_beginnings_and_of_no_other():
    full = cache()
    for ids in (SYSTEM[:20], SYSTEM, [*SYSTEM[:20], *range(9)], SYSTEM):
        full.add(kept(ids))
    assert [len(prompt.state.receiver.ids) for prompt in full._kept] == [29, 30]
    assert full.num_bytes == 59 * 16


def test_the_least_recently_used_go_first_and_leave_nothing_behind():
    full = cache(max_bytes=3 * 20 * 16)
    prompts = [kept([number, *range(19)]) for number in range(5)]
    for prompt in prompts[:3]:
        full.add(prompt)
    assert full.find(state([*prompts[0].state.receiver.ids.tolist(), 7]))[0] is prompts[0]
    for prompt in prompts[3:]:
        full.add(prompt)
    assert list(full._kept) == [prompts[0], *prompts[3:]]
    assert full.find(state([1, *range(19)]))[0] is None
    num_bytes = full.set_aside(state(range(60)), Reuse())
    assert num_bytes == full.num_bytes == 60 * 16
    assert not full._kept
    assert not full._by_beginning
    full.give_back(num_bytes)
    assert full.num_bytes == 0


@pytest.mark.parametrize(("num_rows", "reused", "expected"), [(8, 0, 0), (9, 0, 144), (9, 7, 144), (9, 8, 0)])
def test_room_is_made_for_a_prompt_that_could_go_on_from_more_than_it_did(num_rows: int, reused: int, expected: int):
    assert cache().set_aside(state(range(num_rows)), Reuse(reused)) == expected
