"""The Serve replica around one engine. A plain class: ``app`` wraps it as a deployment, tests drive it as it is."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, replace

from ray import serve
from ray.serve.exceptions import RayServeException

from forkkv_cluster.core.config import ClusterConfig
from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.events import CacheEvent
from forkkv_cluster.core.ids import WorkerId
from forkkv_cluster.core.ports import EventSink
from forkkv_cluster.core.request import AdapterInfo, ContextRequest, GenerateRequest, ModelInfo, Sharing, TokenChunk
from forkkv_cluster.core.status import WorkerStatus
from forkkv_cluster.directory.client import DirectoryClient, directory_name
from forkkv_cluster.worker.engine_port import EnginePort
from forkkv_cluster.worker.engine_thread import EngineThread
from forkkv_cluster.worker.event_publisher import EventPublisher

EngineFactory = Callable[[ClusterConfig], tuple[EnginePort, str]]
"""Makes an engine, and says what it runs on (``cpu``, ``cuda``)."""


def make_engine(config: ClusterConfig) -> tuple[EnginePort, str]:
    """The real engine. Imported here, so that a worker on a fake one loads no torch."""
    from forkkv_cluster.engine.engine import Engine
    from forkkv_cluster.engine.model_loader import resolve_device

    return Engine.from_config(config), str(resolve_device(config.model.device))


LEAVE_DELAY_S = 0.5
"""Between the failure of an engine and the end of its process: time for the streams' errors to reach the gateway."""


def _leave_replica() -> None:
    """End this process if it is a Serve replica: Serve starts another one at once, instead of after three health checks
    (25 s) in which the router would go on choosing a worker that refuses everything."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return  # driven directly, by a test
    asyncio.get_running_loop().call_later(LEAVE_DELAY_S, os._exit, 1)


class ForkKVWorker:
    """One engine and its id. Must be made on the loop that it serves on, as Serve does.

    ``worker_id`` is new in each life: a restarted worker keeps nothing, not even its name.
    """

    def __init__(
        self, config: ClusterConfig, engine_factory: EngineFactory = make_engine, sink: EventSink | None = None
    ) -> None:
        self._config = config
        self._worker_id = WorkerId(f"worker-{uuid.uuid4().hex[:8]}")
        self._epoch = time.time_ns()
        engine, self._device = engine_factory(config)
        self._model_info = engine.model_info
        self._thread = EngineThread(
            engine,
            flush_interval_s=config.worker.flush_interval_s,
            on_events=self._on_events,
            on_failure=_leave_replica,
        )
        directory = sink or DirectoryClient(directory_name(config.server.app_name), creates=True)
        self._publisher = EventPublisher(self._worker_id, self._epoch, directory, self._thread.snapshot)
        self._thread.start()
        self._publishing = asyncio.get_running_loop().create_task(self._publisher.run())

    def _on_events(self, first_seq: int, events: tuple[CacheEvent, ...]) -> None:
        self._publisher.record(first_seq, events)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of ``request``, the last one with a ``finish_reason``. Raises ForkKVError; closing early cancels."""
        # aclosing: an abandoned generator is closed by the collector, some time; pages must come free now.
        async with aclosing(self._thread.generate(request)) as stream:
            async for chunk in stream:
                yield replace(chunk, worker_id=self._worker_id)

    async def run_context(self, request: ContextRequest) -> TokenChunk:
        """Run a context pass to its end; the terminal chunk carries its usage."""
        async with aclosing(self._thread.generate(request)) as stream:
            async for chunk in stream:
                if chunk.finish_reason is not None:
                    return replace(chunk, worker_id=self._worker_id)
        raise Internal(f"context pass {request.request_id} ended without a terminal chunk.")

    async def load_adapter(self, name: str, path: str, sharing: Sharing | None = None) -> AdapterInfo:
        """``sharing`` as for ``EnginePort.register_adapter``. Raises InvalidArgument, NotFound, AlreadyExists."""
        return await self._thread.load_adapter(name, path, sharing)

    async def unload_adapter(self, name: str) -> None:
        """Raises NotFound, FailedPrecondition."""
        await self._thread.call(lambda engine: engine.unload_adapter(name))

    async def release_hint(self, session_id: str) -> None:
        """The session is closed: its context is evicted like any other from now on. Unknown ones are ignored."""
        await self._thread.call(lambda engine: engine.release_hint(session_id))

    async def list_adapters(self) -> tuple[AdapterInfo, ...]:
        return await self._thread.call(lambda engine: engine.list_adapters())

    async def model_info(self) -> ModelInfo:
        return self._model_info

    async def status(self) -> WorkerStatus:
        """As of between two steps."""
        engine_status = await self._thread.call(lambda engine: engine.status())
        return WorkerStatus(
            worker_id=self._worker_id,
            epoch=self._epoch,
            pid=os.getpid(),
            device=self._device,
            model=self._model_info,
            engine=engine_status,
            events_published=self._publisher.num_published,
            busy_request_ids=self._thread.request_ids,
        )

    def record_replica_metadata(self) -> dict[str, object]:
        """What never changes, sent to every router once: this worker's id, and bytes of base KV for one block."""
        block_bytes = self._model_info.base_bytes_per_token * self._config.cache.page_size
        return {"worker_id": self._worker_id, "block_bytes": block_bytes}

    def record_routing_stats(self) -> dict[str, object]:
        """What the router reads as ``replica.routing_stats``. The same while idle: Serve tells routers only of changes."""
        return {"worker_id": self._worker_id, **asdict(self._thread.load)}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Metrics for an autoscaling policy, by name."""
        load = self._thread.load
        return {
            "queued_prefill_blocks": float(load.queued_prefill_blocks),
            "num_active": float(load.num_active),
            "kv_used_fraction": 1.0 - load.free_bytes / load.total_bytes if load.total_bytes else 0.0,
        }

    def check_health(self) -> None:
        """Raises when the engine has failed: Serve then replaces this replica."""
        self._thread.check()
        if self._publishing.done() and not self._publishing.cancelled() and self._publishing.exception() is not None:
            raise Internal(f"publishing cache events failed: {self._publishing.exception()}. The worker must be replaced.")

    def close(self) -> None:
        """Stop the engine and the publisher. Harmless when repeated."""
        self._publishing.cancel()
        self._thread.close()

    def __del__(self) -> None:
        # Serve calls this at shutdown, after requests have drained; a constructor that failed left nothing to stop.
        if "_publishing" in self.__dict__:
            self.close()
