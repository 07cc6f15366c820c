"""Requests that wait for a slot: by priority, with turns between clients.

Of the priorities that wait, the one is served whose number, plus one for each `aging_seconds` that its oldest request
has waited, is the highest: a low priority waits longer, and not for ever. Within a priority clients take turns, so that
one that sends a hundred requests delays another's first by one of its own, and a newcomer does not go before those that
wait for their turn; a client's requests are served as they came.

Not thread-safe: `runtime.admission` holds its lock.
"""

import time
from collections.abc import Callable

from runtime.active_request import ActiveRequest


class RequestQueue:
    """As many as are put there; the scheduler bounds them."""

    def __init__(self, aging_seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._aging_seconds, self._clock = aging_seconds, clock
        self._waiting: list[ActiveRequest] = []
        self._served: dict[str, int] = {}
        """By client that waits: the number of its last turn, or of the earliest last turn when it came."""
        self._turn = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, active: ActiveRequest) -> None:
        """Let a request wait."""
        client = active.request.client
        if client not in self._served:
            self._served[client] = min(self._served.values(), default=self._turn)
        self._waiting.append(active)

    def take(self) -> ActiveRequest | None:
        """The request that is served next, which waits no longer; None when nobody waits."""
        if not self._waiting:
            return None
        now = self._clock()
        oldest: dict[int, float] = {}
        for active in self._waiting:
            level = active.request.priority
            oldest[level] = min(oldest.get(level, active.submitted), active.submitted)
        priority = max(oldest, key=lambda rank: (rank + (now - oldest[rank]) / self._aging_seconds, rank))
        first_of_client: dict[str, ActiveRequest] = {}
        for active in self._waiting:
            if active.request.priority == priority:
                first_of_client.setdefault(active.request.client, active)
        chosen = min(first_of_client.values(), key=lambda active: self._served[active.request.client])
        self._turn += 1
        self._served[chosen.request.client] = self._turn
        self._remove(chosen)
        return chosen

    def remove(self, active: ActiveRequest) -> bool:
        """Take a request out of its turn; whether it was waiting."""
        if active not in self._waiting:
            return False
        self._remove(active)
        return True

    def _remove(self, active: ActiveRequest) -> None:
        self._waiting.remove(active)
        client = active.request.client
        if all(other.request.client != client for other in self._waiting):
            del self._served[client]
