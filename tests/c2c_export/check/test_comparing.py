"""Rows are compared by their own size, a fuser's by what was added, and rows that are not written must not change."""

import numpy as np
import pytest
from polygraphy.comparator import IterationResult

from c2c_export.check.comparing import ENDLESS, CompareRows, RowsResult, Tolerances, in_order, row_errors
from c2c_export.check.feeds.feed import GraphFeed

CAPACITY = 8


def cache(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, CAPACITY, 4)).astype(np.float32)


@pytest.fixture
def feed() -> GraphFeed:
    return GraphFeed("a step", {"past_key.0": cache(0)}, (range(2, 3), range(5, 6)))


def compared(feed: GraphFeed, expected: np.ndarray, found: np.ndarray, *, corrections: bool = False) -> RowsResult:
    compare = CompareRows(feed, {"key.0": "float32"}, Tolerances(1e-3), corrections=corrections)
    return compare(IterationResult({"key.0": expected}), IterationResult({"key.0": found}))["key.0"]


def written(feed: GraphFeed) -> np.ndarray:
    rows = feed.inputs["past_key.0"].copy()
    rows[0, :, 2], rows[1, :, 5] = cache(1)[0, :, 2], cache(1)[1, :, 5]
    return rows


def test_equal_caches_pass(feed: GraphFeed):
    assert compared(feed, written(feed), written(feed))


def test_the_row_of_the_slot_and_head_that_is_off_is_told(feed: GraphFeed):
    found = written(feed)
    found[1, 2, 5] *= 1.01
    result = compared(feed, written(feed), found)
    assert not result
    assert np.argwhere(result.errors > 1e-3).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("row", [1, 5])
def test_a_row_that_the_call_does_not_write_may_not_change(feed: GraphFeed, row: int):
    found = written(feed)
    found[0, 1, row] += 1e-6
    result = compared(feed, written(feed), found)
    assert not result
    assert result.changed == [(0, 1, row)]


def test_what_is_not_finite_fails(feed: GraphFeed):
    found = written(feed)
    found[0, 0, 2, 1] = np.nan
    assert compared(feed, written(feed), found).relative_error == ENDLESS


def test_corrections_are_compared_by_their_own_size(feed: GraphFeed):
    past = feed.inputs["past_key.0"]
    expected, found = past.copy(), past.copy()
    for slot, rows in enumerate(feed.written):
        expected[slot, :, rows.start] += 0.01
        found[slot, :, rows.start] += 0.0101
    assert compared(feed, expected, found)
    assert compared(feed, expected, found, corrections=True).relative_error == pytest.approx(0.01, rel=0.01)


def test_a_row_near_zero_is_compared_by_the_size_of_the_others():
    expected = np.array([[3.0, 4.0], [0.0, 0.0]])
    found = np.array([[3.0, 4.0], [0.005, 0.0]])
    typical = np.sqrt((25 + 0) / 2)
    np.testing.assert_allclose(row_errors(expected, found), [0, 0.005 / typical])


def test_outputs_come_in_the_order_of_the_layers():
    names = ["logits", "value.10", "key.10", "value.2", "key.2"]
    assert in_order(names) == ["key.2", "value.2", "key.10", "value.10", "logits"]
