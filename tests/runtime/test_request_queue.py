"""Who is served next: higher priorities, but low ones not never; clients by turns; each client's as they came."""

from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.active_request import ActiveRequest
from runtime.request import QueueFullError, Request
from runtime.request_queue import RequestQueue


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def waiting(client: str = "", priority: int = 0, submitted: float = 0.0) -> ActiveRequest:
    nothing = cast("Any", None)  # the queue reads none of these
    request = Request(prompt="Hi", client=client, priority=priority)
    return ActiveRequest(request, nothing, nothing, nothing, nothing, submitted=submitted)


def queue_of(*requests: ActiveRequest, clock: Clock | None = None, aging: float = 10.0) -> RequestQueue:
    queue = RequestQueue(100, aging, clock or Clock())
    for request in requests:
        queue.put(request, 0, 1.0)
    return queue


def served(queue: RequestQueue) -> list[ActiveRequest]:
    order = []
    while (request := queue.take()) is not None:
        order.append(request)
    return order


def test_a_clients_requests_are_served_as_they_came():
    requests = [waiting() for _ in range(5)]
    assert served(queue_of(*requests)) == requests


def test_clients_take_turns_however_much_one_sends():
    flood, others = [waiting("a") for _ in range(6)], [waiting("b"), waiting("c"), waiting("b")]
    order = [request.request.client for request in served(queue_of(*flood, *others))]
    assert order == ["a", "b", "c", "a", "b", "a", "a", "a", "a"]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30))
def test_no_client_is_served_twice_while_another_that_waits_is_not(clients: list[str]):
    left = Counter(clients)
    since: dict[str, int] = dict.fromkeys(left, 0)
    for request in served(queue_of(*(waiting(client) for client in clients))):
        client = request.request.client
        left[client] -= 1
        for other in since:
            since[other] = 0 if other == client else since[other] + 1
            assert not left[other] or since[other] < len(since)


def test_a_higher_priority_is_served_first():
    low, high, middle = waiting(priority=-1), waiting(priority=3), waiting(priority=0)
    assert served(queue_of(low, high, middle)) == [high, middle, low]


def test_waiting_raises_a_priority_so_that_none_waits_for_ever():
    clock = Clock()
    low = waiting(priority=0, submitted=0.0)
    queue = queue_of(low, clock=clock)
    for second in range(1, 40):
        clock.now = float(second)
        queue.put(waiting(priority=2, submitted=clock.now), 0, 1.0)
        if queue.take() is low:
            break
    assert second == 21  # two levels of ten seconds, and more than the newcomer has


def test_a_full_queue_says_when_to_come_again():
    queue = RequestQueue(2, 10.0)
    queue.put(waiting(), 0, 1.0)
    queue.put(waiting(), 0, 1.0)
    with pytest.raises(QueueFullError, match="2 requests wait") as refused:
        queue.put(waiting(), 0, 7.5)
    assert refused.value.retry_after == 7.5
    assert len(queue) == 2
    queue.put(waiting(), 1, 1.0)  # a slot is free: this one hardly waits
    with pytest.raises(QueueFullError):
        queue.put(waiting(), 1, 1.0)


def test_what_is_removed_is_not_served():
    first, second = waiting(), waiting()
    queue = queue_of(first, second)
    assert queue.remove(first)
    assert not queue.remove(first)
    assert served(queue) == [second]
