"""How much of a prompt is computed between two decode steps."""

import pytest

from runtime.stall_budget import StallBudget


def seconds_of(rows: int, overhead: float, per_row: float) -> float:
    return overhead + rows * per_row


@pytest.mark.parametrize(("overhead", "per_row"), [(0.0, 0.001), (0.02, 0.0005), (0.05, 0.01)])
def test_pieces_grow_to_the_budget_and_not_beyond_it(overhead: float, per_row: float):
    budget = StallBudget(0.2)
    rows = 0
    for _ in range(12):
        rows = budget.rows("receiver", 0.0)
        assert seconds_of(rows, overhead, per_row) <= max(0.2, seconds_of(16, overhead, per_row))
        budget.measured("receiver", rows, seconds_of(rows, overhead, per_row))
    assert seconds_of(rows, overhead, per_row) > 0.2 * 0.6


def test_a_slower_moment_makes_pieces_smaller_and_a_remainder_does_not():
    budget = StallBudget(0.2)
    budget.measured("receiver", 100, 0.1)
    assert budget.rows("receiver", 0.0) == 160
    budget.measured("receiver", 3, 0.05)
    assert budget.rows("receiver", 0.0) == 160
    budget.measured("receiver", 100, 0.4)
    assert budget.rows("receiver", 0.0) == 40


def test_the_end_of_a_budget_is_left_unused():
    budget = StallBudget(0.2)
    budget.measured("receiver", 100, 0.1)
    assert budget.rows("receiver", 0.05) == 120
    assert budget.rows("receiver", 0.15) == 0


def test_kinds_of_work_are_told_apart():
    budget = StallBudget(0.2)
    budget.measured("receiver", 100, 2.0)
    assert budget.rows("fuser", 0.0) == 16
    assert budget.rows("receiver", 0.0) == 8
