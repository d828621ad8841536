"""Calls of workers as Serve sees them; Ray's and Serve's errors in our words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_serve_request_context, _RequestContext, _serve_request_context
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from forkkv_cluster.core.errors import Cancelled, Internal, NotFound, ResourceExhausted, Unavailable, WorkerStopped
from forkkv_cluster.core.request import FinishReason, TokenChunk
from forkkv_cluster.gateway.worker_pool import ServeWorkerPool, WorkerLost, translate
from forkkv_cluster.testing.requests import context_request, generate_request


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


class RecordingHandle:
    """A Serve handle that notes the internal request id under which it is called."""

    def __init__(self) -> None:
        self.internal_ids: list[str] = []

    def options(self, **options: Any) -> RecordingHandle:
        return self

    def remote(self, *arguments: Any) -> Any:
        self.internal_ids.append(_get_serve_request_context()._internal_request_id)
        return Answer()


class Answer:
    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[TokenChunk]:
        yield TokenChunk("r", finish_reason=FinishReason.STOP)

    def __await__(self) -> Iterator[Any]:
        yield from ()
        return TokenChunk("r", finish_reason=FinishReason.STOP)


async def test_calls_within_one_request_do_not_share_its_internal_id() -> None:
    """Serve's router keeps one waiting call for each internal id: a second one would never be sent."""
    handle = RecordingHandle()
    pool = ServeWorkerPool(handle)
    token = _serve_request_context.set(_RequestContext(_internal_request_id="the http request"))
    try:
        for _ in range(2):
            assert [chunk.finish_reason async for chunk in pool.generate(generate_request([1, 2]))] == [FinishReason.STOP]
        await pool.run_context(context_request([1, 2]))
        await pool.model_info()
    finally:
        _serve_request_context.reset(token)
    assert handle.internal_ids == [""] * 4, "with an empty one Serve draws one for each call"
