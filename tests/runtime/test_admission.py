"""Places, queue and slots: an id is one request's at a time, and what is held is told apart from what came after it."""

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from c2c_export.errors import UsageError
from runtime import AbortedError, DeadlineError, QueueFullError, Request
from runtime.active_request import ActiveRequest
from runtime.admission import Admission, Place

NOTHING: Any = SimpleNamespace()


def planned(place: Place) -> ActiveRequest:
    return ActiveRequest(place.request, NOTHING, NOTHING, NOTHING, lambda _: None, submitted=place.since)


def admission(num_slots: int = 2, max_waiting: int = 1) -> Admission:
    return Admission(num_slots, max_waiting, aging_seconds=10.0)


def taken(desk: Admission, request_id: str) -> ActiveRequest:
    place = desk.reserve(Request(prompt="Hi", request_id=request_id))
    desk.enqueue(place, planned(place))
    found = desk.take()
    assert found is not None
    return found[0]


def test_a_request_goes_from_its_place_to_the_queue_to_a_slot_to_its_end():
    desk = admission()
    place = desk.reserve(Request(prompt="Hi"))
    assert (desk.num_waiting, desk.num_queued, desk.num_served, desk.num_requests) == (1, 0, 0, 1)
    active = planned(place)
    assert desk.enqueue(place, active) == 1
    assert (desk.num_waiting, desk.num_queued, place.active) == (1, 1, active)
    assert desk.take() == (active, 0)
    assert (active.slot, desk.free_slots) == (0, (1,))
    assert (desk.num_waiting, desk.num_queued, desk.num_served, desk.num_requests) == (0, 0, 1, 1)
    assert desk.find(active.request.request_id) is active
    assert desk.end(active)
    assert not desk.end(active)
    assert not desk.num_requests
    desk.free(0)
    assert sorted(desk.free_slots) == [0, 1]
    assert desk.take() is None


def test_an_id_that_comes_again_is_another_request():
    desk = admission()
    first = desk.reserve(Request(prompt="Hi", request_id="same"))
    with pytest.raises(UsageError, match="'same' is in use"):
        desk.reserve(Request(prompt="Hi", request_id="same"))
    assert desk.drop(first)
    assert not desk.drop(first)
    second = desk.reserve(Request(prompt="Hi", request_id="same"))
    with pytest.raises(AbortedError):
        desk.enqueue(first, planned(first))
    assert desk.holds(second)
    active = planned(second)
    desk.enqueue(second, active)
    assert not desk.end(planned(first))
    assert desk.find("same") is active


def test_a_place_is_let_go_of_by_its_id():
    desk = admission()
    place = desk.reserve(Request(prompt="Hi", request_id="planned"))
    assert desk.drop_id("planned") is place
    assert desk.drop_id("planned") is None
    assert not desk.holds(place)
    assert not desk.num_requests
    active = taken(desk, "served")
    assert desk.drop_id("served") is None
    assert desk.find("served") is active


def test_places_are_let_go_of_all_at_once_or_when_they_are_overdue():
    desk = admission(max_waiting=5)
    patient, hurried = (desk.reserve(Request(prompt="Hi", deadline=deadline)) for deadline in (100.0, 1e-9))
    assert desk.drop_overdue() == [hurried]
    hurried.error = DeadlineError("late")
    with pytest.raises(DeadlineError):
        desk.enqueue(hurried, planned(hurried))
    assert desk.drop_all() == [patient]
    assert not desk.num_requests


def test_as_many_may_wait_as_there_are_slots_to_come_and_some_more():
    desk = admission(num_slots=2, max_waiting=1)
    served = taken(desk, "served")
    places = [desk.reserve(Request(prompt="Hi")) for _ in range(2)]  # one of them has a slot at once
    with pytest.raises(QueueFullError, match="2 requests wait"):
        desk.reserve(Request(prompt="Hi"))
    desk.drop(places[0])
    desk.reserve(Request(prompt="Hi"))
    desk.end(served)  # its slot may be busy for a while, and is nobody's
    desk.reserve(Request(prompt="Hi"))


def test_waiting_is_estimated_by_what_was_served():
    desk = admission(num_slots=1, max_waiting=3)
    for _ in range(100):
        desk.served(20.0)
    for _ in range(4):
        desk.reserve(Request(prompt="Hi"))
    with pytest.raises(QueueFullError) as refused:
        desk.reserve(Request(prompt="Hi"))
    assert refused.value.retry_after == pytest.approx(80, rel=0.01)


def test_of_many_threads_that_want_one_place_one_gets_it():
    desk = admission(num_slots=1, max_waiting=0)
    begin, got = threading.Barrier(8), []

    def ask() -> None:
        begin.wait()
        with contextlib.suppress(QueueFullError):
            got.append(desk.reserve(Request(prompt="Hi")))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
