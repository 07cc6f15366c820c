"""What a call of a replica ends with: errors as they were there, lost replicas told from failed ones, bounded tries."""

import pickle

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from c2c_export.errors import AnswerTooLongError, PromptError, PromptTooLongError
from runtime import AbortedError, BundleError, C2CError, ClosedError, DeadlineError, QueueFullError, UsageError
from runtime.server.ray.replica_calls import PAUSES, LostReplicas, ReplicaClosingError, ReplicaLostError, own_error

pytestmark = pytest.mark.xdist_group("ray")
OURS = (
    AbortedError,
    AnswerTooLongError,
    BundleError,
    C2CError,
    DeadlineError,
    PromptError,
    PromptTooLongError,
    UsageError,
)


def raised_in_a_replica(error: Exception) -> Exception:
    """What Ray raises here for an error that was raised there."""
    try:
        raise error
    except Exception as caught:
        task_error: Exception = RayTaskError("replica", "the replica's traceback", caught).as_instanceof_cause()
        return task_error


@pytest.mark.parametrize("kind", OURS)
def test_errors_of_ours_arrive_as_they_were_raised(kind: type[C2CError]):
    found = own_error(raised_in_a_replica(kind("what was found")), "Pipeline")
    assert (type(found), str(found)) == (kind, "what was found")


@pytest.mark.parametrize("kind", OURS)
def test_errors_of_ours_can_be_sent(kind: type[C2CError]):
    sent = pickle.loads(pickle.dumps(kind("what was found")))
    assert (type(sent), str(sent)) == (kind, "what was found")


def test_a_full_queue_arrives_with_its_estimate():
    found = own_error(raised_in_a_replica(pickle.loads(pickle.dumps(QueueFullError("full", 2.5)))), "Pipeline")
    assert isinstance(found, QueueFullError)
    assert (str(found), found.retry_after) == ("full", 2.5)


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        ActorUnavailableError("gone", b"0" * 16),
        ObjectLostError("0" * 56, None, ""),
        WorkerCrashedError(),
        raised_in_a_replica(ClosedError("the engine is closing")),
    ],
)
def test_a_lost_replica_is_told_from_one_that_fails(error: Exception):
    found = own_error(error, "Pipeline")
    assert isinstance(found, ReplicaLostError)
    assert str(found).startswith("a replica of Pipeline was lost: ")
    assert len(str(found).splitlines()) == 1


def test_other_errors_of_rays_become_ours():
    assert isinstance(own_error(RequestCancelledError("7"), "Pipeline"), AbortedError)
    full = own_error(BackPressureError(5, 4), "Pipeline")
    assert isinstance(full, QueueFullError)
    assert full.retry_after > 0
    failed = own_error(TaskUnschedulableError("no such node"), "Pipeline")
    assert type(failed) is C2CError
    assert "no such node" in str(failed)


def test_a_fault_of_the_code_stays_what_it_is():
    fault = own_error(raised_in_a_replica(KeyError("x")), "Pipeline")
    assert type(fault) is KeyError


def test_a_call_is_given_up_after_so_many_lost_replicas():
    lost = LostReplicas("request 7")
    died = ReplicaLostError("a replica of Pipeline was lost: it died")
    stopped = own_error(raised_in_a_replica(ClosedError("the engine is closing")), "Pipeline")
    assert isinstance(stopped, ReplicaClosingError)
    pauses = []
    for _ in range(3):
        pauses.append(lost.add(died))
        assert lost.add(stopped) > 0  # and does not count
    assert tuple(pauses) == PAUSES == (0.2, 1.0, 3.0)
    with pytest.raises(C2CError, match=r"request 7: 4 replicas were lost over it, it is given up; .* it died"):
        lost.add(died)
