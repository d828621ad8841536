"""What the worker asks of an engine. ``engine.engine.Engine`` is one, ``testing.fake_engine.FakeEngine`` another."""

from __future__ import annotations

from typing import Protocol

from forkkv_cluster.core.events import CacheEvent
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.placement import WorkerLoad
from forkkv_cluster.core.request import AdapterInfo, ContextRequest, GenerateRequest, ModelInfo, Sharing
from forkkv_cluster.core.status import EngineStatus
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.outputs import StepOutput

WorkRequest = GenerateRequest | ContextRequest


class EnginePort(Protocol):
    """Not thread-safe: every method but ``read_adapter`` is called on the engine's own thread."""

    @property
    def model_info(self) -> ModelInfo: ...

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do, or say, anything."""
        ...

    def add_request(self, request: WorkRequest) -> None:
        """Queue it. Raises InvalidArgument, NotFound, ResourceExhausted or DeadlineExceeded; then nothing is queued."""
        ...

    def abort(self, request_id: RequestId) -> None:
        """End it with Failure(Cancelled) in the next step's output. Unknown ids have ended already."""
        ...

    def step(self) -> StepOutput:
        """One forward pass. Without work it only hands out what is still to be said."""
        ...

    def read_adapter(self, name: str, path: str, sharing: Sharing | None = None) -> Weights:
        """Read and check it, and what registering it with ``sharing`` needs; changes nothing, on whatever thread. Raises
        InvalidArgument."""
        ...

    def register_adapter(self, name: str, weights: Weights, sharing: Sharing | None = None) -> AdapterInfo:
        """Serve what has been read. ``sharing``: how ``auto`` is served on it; None: as it is registered already, else the
        configured default. Raises AlreadyExists, Unsupported or InvalidArgument; then nothing is loaded."""
        ...

    def unload_adapter(self, name: str) -> None:
        """Raises NotFound, FailedPrecondition."""
        ...

    def list_adapters(self) -> tuple[AdapterInfo, ...]: ...

    def release_hint(self, session_id: str) -> None:
        """Keep that session's context no longer than any other. Unknown ones are ignored."""
        ...

    def status(self) -> EngineStatus: ...

    def load(self) -> WorkerLoad: ...

    def snapshot_events(self) -> tuple[CacheEvent, ...]:
        """The whole cache as events: applied to nothing, they give what it holds now."""
        ...
