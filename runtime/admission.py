"""Which requests are taken: a place for each that is asked for, a bounded queue, and slots for those whose turn it is.

A request has a place while it is planned, then waits in the queue, then has a slot, and ends from wherever it is. An id
is one request's at a time; who holds a place or a request holds the object, as its id may be another's by then.

Any thread may call these methods; `take`, `end` and `free` are for the scheduler's.
"""

import heapq
import threading
import time
from dataclasses import dataclass

from c2c_export.errors import C2CError, UsageError
from runtime.active_request import ActiveRequest, Listener
from runtime.request import AbortedError, QueueFullError, Request
from runtime.request_queue import RequestQueue


@dataclass(eq=False)
class Place:
    """A place in the queue for a request that is planned meanwhile."""

    request: Request
    since: float
    """When it was asked for, by `time.perf_counter`."""
    listener: Listener | None = None
    """Hears at once that the place was let go of, not only when the prompt is planned."""
    active: ActiveRequest | None = None
    """The request itself, once it is planned and waits."""
    error: C2CError | None = None
    """Why the place was let go of, where that was not its request's own wish."""

    def lost(self) -> C2CError:
        """What a request ends with whose place was let go of."""
        return self.error or AbortedError("the request was aborted")


class Admission:
    """Places, queue and slots; `num_slots` requests are served at once, and `max_waiting` more may wait."""

    def __init__(self, num_slots: int, max_waiting: int, aging_seconds: float) -> None:
        self.num_slots = num_slots
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._queue = RequestQueue(aging_seconds)
        self._planned_places: dict[str, Place] = {}
        self._live: dict[str, ActiveRequest] = {}
        """Those that wait in the queue or have a slot."""
        self._free_slots = list(range(num_slots))
        self._seconds_per_request = 1.0

    @property
    def num_queued(self) -> int:
        """Requests that are planned and wait for a slot."""
        return len(self._queue)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, those that are being planned included."""
        with self._lock:
            return self._num_waiting

    @property
    def num_served(self) -> int:
        """Requests with a slot."""
        with self._lock:
            return self._num_requests - self._num_waiting

    @property
    def num_requests(self) -> int:
        """Requests that are being planned, wait or have a slot."""
        with self._lock:
            return self._num_requests

    @property
    def free_slots(self) -> tuple[int, ...]:
        """Slots that nobody has."""
        return tuple(self._free_slots)

    def reserve(self, request: Request, listener: Listener | None = None) -> Place:
        """A place, at once; the request's time runs from now on. `listener` is the place's.

        Raises `QueueFullError` where no more may wait (as many as there are unserved slots hardly do, and do not
        count), and `UsageError` where another request has its id.
        """
        with self._lock:
            if request.request_id in self._live or request.request_id in self._planned_places:
                raise UsageError(f"request_id: {request.request_id!r} is in use by another request")
            if self._num_requests >= self._max_waiting + self.num_slots:
                num_waiting = self._num_waiting
                retry_after = max(1.0, self._seconds_per_request * num_waiting)
                raise QueueFullError(
                    f"{num_waiting} requests wait already, as many as may; try again in some seconds", retry_after
                )
            place = Place(request, time.perf_counter(), listener)
            self._planned_places[request.request_id] = place
            return place

    def holds(self, place: Place) -> bool:
        """Whether a place is still kept for its request."""
        return self._planned_places.get(place.request.request_id) is place

    def drop(self, place: Place) -> bool:
        """Let go of a place; whether it was still kept."""
        with self._lock:
            return self._take_back(place)

    def drop_id(self, request_id: str) -> Place | None:
        """Let go of the place of a request that is being planned, if there is one."""
        with self._lock:
            return self._planned_places.pop(request_id, None)

    def drop_all(self) -> list[Place]:
        """Let go of every place; gives those."""
        with self._lock:
            places = list(self._planned_places.values())
            self._planned_places.clear()
            return places

    def drop_overdue(self) -> list[Place]:
        """Let go of the places of requests whose deadline has passed; gives those."""
        with self._lock:
            places = [place for place in self._planned_places.values() if place.request.is_overdue(place.since)]
            for place in places:
                self._take_back(place)
            return places

    def enqueue(self, place: Place, active: ActiveRequest) -> int:
        """Let a planned request wait; returns how many do. Raises `Place.lost` where its place was let go of."""
        with self._lock:
            if not self._take_back(place):
                raise place.lost()
            self._queue.put(active)
            self._live[active.request.request_id] = active
            place.active = active
            return len(self._queue)

    def find(self, request_id: str) -> ActiveRequest | None:
        """The request that waits or has a slot under this id."""
        return self._live.get(request_id)

    def every(self) -> list[ActiveRequest]:
        """All requests that wait or have a slot."""
        with self._lock:
            return list(self._live.values())

    def take(self) -> tuple[ActiveRequest, int] | None:
        """The request whose turn it is, with a slot from now on, and how many wait still; None without either."""
        with self._lock:
            active = self._queue.take() if self._free_slots else None
            if active is None:
                return None
            # The lowest free slot, so that the slots of a decode step lie together.
            active.slot = heapq.heappop(self._free_slots)
            return active, len(self._queue)

    def end(self, active: ActiveRequest) -> bool:
        """Forget a request, which leaves its slot to `free`; whether it was there."""
        with self._lock:
            if self._live.get(active.request.request_id) is not active:
                return False
            del self._live[active.request.request_id]
            self._queue.remove(active)
            return True

    def free(self, slot: int) -> None:
        """The slot may be the next request's."""
        with self._lock:
            heapq.heappush(self._free_slots, slot)

    def served(self, seconds: float) -> None:
        """A request was answered, so long after it got its slot; from this waiting times are estimated."""
        self._seconds_per_request += 0.1 * (seconds / self.num_slots - self._seconds_per_request)

    @property
    def _num_waiting(self) -> int:
        return len(self._queue) + len(self._planned_places)

    @property
    def _num_requests(self) -> int:
        return len(self._live) + len(self._planned_places)

    def _take_back(self, place: Place) -> bool:
        if not self.holds(place):
            return False
        del self._planned_places[place.request.request_id]
        return True
