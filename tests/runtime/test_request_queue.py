"""Who is served next: higher priorities, but low ones not never; clients by turns; each client's as they came."""

from collections import Counter
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from runtime.active_request import ActiveRequest
from runtime.request import Request
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
    queue = RequestQueue(aging, clock or Clock())
    for request in requests:
        queue.put(request)
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
        queue.put(waiting(priority=2, submitted=clock.now))
        if queue.take() is low:
            break
    assert second == 21  # two levels of ten seconds, and more than the newcomer has


def test_newcomers_do_not_go_before_one_that_waits_for_its_turn():
    queue = queue_of(waiting("alice"), waiting("alice"), waiting("bob"))
    assert [request.request.client for request in (queue.take(), queue.take())] == ["alice", "bob"]
    for number in range(3):
        queue.put(waiting(f"newcomer {number}"))
    assert queue.take().request.client == "alice"


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3)), min_size=1, max_size=60))
def test_whoever_comes_meanwhile_none_waits_for_more_turns_than_there_are_requests_before_it(
    arrivals: list[tuple[str, int]],
):
    queue = queue_of()
    waited: dict[ActiveRequest, int] = {}
    ahead: dict[ActiveRequest, int] = {}
    for client, turns in arrivals:
        request = waiting(client)
        own = sum(other.request.client == client for other in waited)
        # Every request of its own before it, and a turn of each other client for each of those and for itself.
        ahead[request] = own + (own + 1) * 6
        queue.put(request)
        waited[request] = 0
        for _ in range(turns):
            served_now = queue.take()
            if served_now is None:
                break
            del waited[served_now]
            for other in waited:
                waited[other] += 1
                assert waited[other] <= ahead[other]


def test_clients_that_no_longer_wait_are_forgotten():
    queue = queue_of(waiting("stays"))
    for number in range(50):
        queue.put(waiting(f"client {number}"))
        queue.put(waiting("stays"))
        queue.take()
        queue.take()
    assert len(queue._served) <= len({request.request.client for request in queue._waiting})


def test_what_is_removed_is_not_served():
    first, second = waiting(), waiting()
    queue = queue_of(first, second)
    assert queue.remove(first)
    assert not queue.remove(first)
    assert served(queue) == [second]
