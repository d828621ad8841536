"""Ray's and Serve's errors in our words."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from forkkv_cluster.core.errors import Cancelled, Internal, NotFound, ResourceExhausted, Unavailable, WorkerStopped
from forkkv_cluster.gateway.worker_pool import WorkerLost, translate


def from_task(cause: Exception) -> BaseException:
    """As a remote call raises it: a RayTaskError that poses as its cause."""
    error: BaseException = RayTaskError("generate", "traceback", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    "error",
    [ActorDiedError(), ActorUnavailableError("away", b"1" * 16), ReplicaUnavailableError("r"), from_task(ActorDiedError())],
)
def test_a_dead_worker_is_a_lost_one(error: Exception) -> None:
    assert isinstance(translate(error), WorkerLost)


@pytest.mark.parametrize("is_fault", [False, True])
def test_a_worker_that_stops_in_an_orderly_way_is_a_lost_one(is_fault: bool) -> None:
    lost = translate(from_task(WorkerStopped("the worker is shutting down.", is_fault=is_fault)))
    assert isinstance(lost, WorkerLost)
    assert lost.is_fault is is_fault


def test_a_workers_error_comes_out_as_it_was_raised() -> None:
    original = NotFound("adapter", "planner", "Load it.")
    found = translate(from_task(original))
    assert type(found) is NotFound
    assert found.attributes == original.attributes


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BackPressureError(9, 8), ResourceExhausted),
        (DeploymentUnavailableError(DeploymentID("worker", "app")), Unavailable),
        (TaskCancelledError(), Cancelled),
        (ValueError("odd"), Internal),
        (from_task(ValueError("odd")), Internal),
    ],
)
def test_everything_else_has_a_status(error: Exception, expected: type[Exception]) -> None:
    assert type(translate(error)) is expected
