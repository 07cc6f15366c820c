"""Requests that wait for a slot: bounded, by priority, with turns between clients.

Of the priorities that wait, the one is served whose number, plus one for each `aging_seconds` that its oldest request
has waited, is the highest: a low priority waits longer, and not for ever. Within a priority clients take turns, so that
one that sends a hundred requests delays another's first by one of its own; a client's requests are served as they came.

Not thread-safe: the scheduler holds its lock.
"""

import time
from collections.abc import Callable, Iterator

from runtime.active_request import ActiveRequest
from runtime.request import QueueFullError


class RequestQueue:
    """At most `max_waiting` requests."""

    def __init__(self, max_waiting: int, aging_seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._max_waiting, self._aging_seconds, self._clock = max_waiting, aging_seconds, clock
        self._waiting: list[ActiveRequest] = []
        self._served: dict[str, int] = {}
        """By client that waits or was served lately: the number of its last turn."""
        self._turn = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[ActiveRequest]:
        """In the order of submission."""
        return iter(tuple(self._waiting))

    def put(self, active: ActiveRequest, num_free_slots: int, retry_after: float) -> None:
        """Let a request wait. Raises `QueueFullError` with `retry_after`, in seconds, where no more may.

        As many as there are free slots are about to be served, and do not count.
        """
        if len(self._waiting) >= self._max_waiting + num_free_slots:
            raise QueueFullError(
                f"{len(self._waiting)} requests wait already, as many as may; try again in some seconds", retry_after
            )
        self._waiting.append(active)

    def take(self) -> ActiveRequest | None:
        """The request that is served next, which waits no longer; None when nobody waits."""
        if not self._waiting:
            return None
        now = self._clock()
        oldest: dict[int, float] = {}
        for active in self._waiting:
            oldest.setdefault(active.request.priority, active.submitted)
        priority = max(oldest, key=lambda level: (level + (now - oldest[level]) / self._aging_seconds, level))
        first_of_client: dict[str, ActiveRequest] = {}
        for active in self._waiting:
            if active.request.priority == priority:
                first_of_client.setdefault(active.request.client, active)
        chosen = min(first_of_client.values(), key=lambda active: self._served.get(active.request.client, 0))
        self._turn += 1
        self._served[chosen.request.client] = self._turn
        self._waiting.remove(chosen)
        if not self._waiting:
            self._served.clear()  # turns are taken between those that wait
        return chosen

    def remove(self, active: ActiveRequest) -> bool:
        """Take a request out of its turn; whether it was waiting."""
        if active not in self._waiting:
            return False
        self._waiting.remove(active)
        return True
