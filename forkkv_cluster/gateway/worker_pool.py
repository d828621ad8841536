"""All workers behind one door: a stream on one of them, a context pass on one of them, a control call to every one.

The only file of the gateway that knows Serve handles and Ray's errors. Every replica is reached through the public
``DeploymentHandle.broadcast``; workers need no names and no registry of their own.
"""

from __future__ import annotations

import contextvars
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from forkkv_cluster.core.errors import Cancelled, ForkKVError, Internal, ResourceExhausted, Unavailable, WorkerStopped
from forkkv_cluster.core.request import ContextRequest, GenerateRequest, ModelInfo, TokenChunk


class WorkerLost(Exception):
    """The worker died, or was out of reach, before the request's terminal result. The request may run elsewhere.

    ``is_fault``: its engine failed, perhaps over this very request, which must not take down one worker after another.
    """

    def __init__(self, message: str, *, is_fault: bool = False) -> None:
        super().__init__(message)
        self.is_fault = is_fault


class WorkerPool(Protocol):
    """What the gateway asks of workers. All methods raise ForkKVError or WorkerLost, nothing else."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks until one with a finish_reason. Closing the iterator early cancels the request on its worker."""
        ...

    async def run_context(self, request: ContextRequest) -> TokenChunk:
        """The terminal chunk of a context pass."""
        ...

    async def model_info(self) -> ModelInfo:
        """Of any worker; waits until one is up."""
        ...

    async def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """Call every worker that is up; one result each, an exception in the place of a failed one's."""
        ...


class ServeWorkerPool:
    """Workers behind a Serve ``DeploymentHandle``; which one serves a request is the handle's router's choice."""

    def __init__(self, handle: Any, *, broadcast_timeout_s: float = 60.0) -> None:
        self._handle = handle
        self._broadcast_timeout_s = broadcast_timeout_s

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        response = _by_itself(lambda: self._handle.options(method_name="generate", stream=True).remote(request))
        is_over = False
        try:
            async for chunk in response:
                is_over = chunk.finish_reason is not None
                yield chunk
        except Exception as error:
            is_over = True
            raise translate(error) from None
        finally:
            if not is_over:
                response.cancel()

    async def run_context(self, request: ContextRequest) -> TokenChunk:
        try:
            chunk: TokenChunk = await _by_itself(lambda: self._handle.options(method_name="run_context").remote(request))
            return chunk
        except Exception as error:
            raise translate(error) from None

    async def model_info(self) -> ModelInfo:
        try:
            info: ModelInfo = await _by_itself(lambda: self._handle.options(method_name="model_info").remote())
            return info
        except Exception as error:
            raise translate(error) from None

    async def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        try:
            response = self._handle.broadcast(method, *arguments)
            results = await response.results_async(timeout_s=self._broadcast_timeout_s, return_exceptions=True)
        except TimeoutError:
            raise Unavailable(f"workers did not answer {method} within {self._broadcast_timeout_s} s. Try again.") from None
        except Exception as error:
            raise translate(error) from None
        return [translate(result) if isinstance(result, BaseException) else result for result in results]


def _by_itself(call: Callable[[], Any]) -> Any:
    """Make a handle call outside the request that this one serves.

    Serve gives every call made within a request the request's own internal id, and its router finds waiting calls by that
    id: of two that wait at once, as the choices of one HTTP request do, one would be forgotten for ever.
    """
    return contextvars.Context().run(call)


def translate(error: BaseException) -> Exception:
    """Ray's and Serve's errors in our words. A worker's own ForkKVError comes out of the wrapping as it was raised."""
    from ray.exceptions import ObjectLostError, RayActorError, TaskCancelledError, WorkerCrashedError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

    lost = (RayActorError, ReplicaUnavailableError, WorkerCrashedError, ObjectLostError)
    cause = getattr(error, "cause", None)
    for candidate in (cause, error):
        # RayTaskError poses as a subclass of its cause: only the cause itself is a whole object.
        if isinstance(candidate, WorkerStopped) and not hasattr(candidate, "cause"):
            return WorkerLost(str(candidate), is_fault=candidate.is_fault)
        if isinstance(candidate, (ForkKVError, WorkerLost)) and not hasattr(candidate, "cause"):
            return candidate
    if isinstance(error, lost) or isinstance(cause, lost):
        return WorkerLost(str(error).splitlines()[0])
    if isinstance(error, BackPressureError):
        return ResourceExhausted(f"workers are full: {error}", error.retry_after_s or 1.0)
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable(f"no worker could be started: {error}. See the server's log.")
    if isinstance(error, TaskCancelledError):
        return Cancelled("the worker's part of the request was cancelled. Send it again.")
    return Internal(f"a worker failed in an unexpected way ({type(error).__name__}): {str(error).splitlines()[-1:]}")
