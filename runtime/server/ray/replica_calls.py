"""Calls of replicas in a Ray cluster: what an error of one means, and how often a call is made again.

In: what awaiting a Serve handle's response raised. Out: an error as one engine would raise it, or `ReplicaLostError`:
the replica is gone, and as calls change nothing but caches, another one may be called. Not covered: choosing it, which
Serve does.
"""

import logging

from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)

from c2c_export.errors import C2CError
from runtime.request import AbortedError, ClosedError, QueueFullError

_log = logging.getLogger(__name__)

PAUSES = (0.2, 1.0, 3.0)
"""Seconds before a call is made again after the first, second and third lost replica, in which Serve may find out that
it is gone and another one may start. With the next one the call is given up: it may be what kills them."""
CLOSING_SECONDS = 60.0
"""Of pauses while one replica after the other says that it is being stopped: Serve sends it no calls for longer than
that, unless something keeps it from stopping it."""
_LOST = (RayActorError, ObjectLostError, WorkerCrashedError, ReplicaUnavailableError)
"""A replica died, cannot be reached, or its answer went with its node."""
_SECONDS_TO_RETRY = 1.0


class ReplicaLostError(C2CError):
    """The replica that worked on a call was lost before it was done."""


class ReplicaClosingError(ReplicaLostError):
    """The replica is being stopped, which no call is to blame for."""


class LostReplicas:
    """Counts the replicas that were lost over one call; of those that are being stopped, the time."""

    def __init__(self, call: str) -> None:
        """`call` is what an error names."""
        self._call = call
        self._num_lost = 0
        self._closing_seconds = 0.0

    def add(self, error: ReplicaLostError) -> float:
        """Note one more. Returns the seconds to wait; raises `C2CError` when the call is not to be made again."""
        _log.warning("a replica was lost", extra={"fields": {"call": self._call, "error": str(error)}})
        if isinstance(error, ReplicaClosingError):
            self._closing_seconds += PAUSES[0]
            if self._closing_seconds > CLOSING_SECONDS:
                what = f"replicas were closing whenever it was made in {CLOSING_SECONDS:g} s, it is given up"
                raise C2CError(f"{self._call}: {what}; {error}") from error
            return PAUSES[0]
        self._num_lost += 1
        if self._num_lost > len(PAUSES):
            what = f"{self._num_lost} replicas were lost over it, it is given up"
            raise C2CError(f"{self._call}: {what}; {error}") from error
        return PAUSES[self._num_lost - 1]


def own_error(error: Exception, deployment: str) -> Exception:
    """The error to raise for `error`, with which a call of a replica of `deployment` ended.

    What the replica's own code raised is returned as it was raised there.
    """
    if isinstance(error, RayTaskError):
        # Ray raises an error of two classes, whose text is the replica's traceback.
        cause = error.cause
        error = cause if isinstance(cause, Exception) else error
    if isinstance(error, ClosedError):
        return ReplicaClosingError(f"a replica of {deployment} was lost: {_first_line(error)}")
    if isinstance(error, _LOST):
        return ReplicaLostError(f"a replica of {deployment} was lost: {_first_line(error)}")
    if isinstance(error, C2CError):
        return error
    if isinstance(error, RequestCancelledError):
        return AbortedError("the request was aborted")
    if isinstance(error, BackPressureError):
        return QueueFullError(f"all replicas of {deployment} are busy; try again later", _SECONDS_TO_RETRY)
    if isinstance(error, DeploymentUnavailableError):
        return C2CError(f"{deployment} could not be deployed; `serve status` says why")
    if isinstance(error, RayError):
        return C2CError(f"a replica of {deployment} failed: {_first_line(error)}")
    return error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
