"""A trace against a running cluster, over gRPC."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from forkkv_cluster.bench.grpc_run import GrpcRun
from forkkv_cluster.bench.idle import wait_until_idle
from forkkv_cluster.bench.metrics import RunRecord, add_counters
from forkkv_cluster.bench.target import WARM_UP, OnProgress, TargetFacts, check_sharing
from forkkv_cluster.bench.trace import Trace
from forkkv_cluster.client import AsyncForkKVClient, Status
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.core.status import EngineCounters

_T = TypeVar("_T")


class GrpcTarget:
    """A cluster at ``address`` (HOST:PORT). Nothing else should use it during a run.

    Without a ``token`` each run acts as tenants of its own, so that no run finds the pages of one before it. With one the
    tenant is the token's: the second run of a trace then starts warm.
    """

    def __init__(self, address: str, *, sharing: Sharing, seed: int = 0, token: str | None = None) -> None:
        self.address = address
        self.sharing = check_sharing(sharing)
        self.seed = seed
        self.token = token
        self._run_id = uuid.uuid4().hex[:8]
        self._writer = ""

    def tenant(self, name: str) -> str:
        """The tenant to act as for a trace's tenant; empty where the token says it."""
        return "" if self.token is not None else f"bench-{self._run_id}-{name}"

    def note_writer(self, writer: str) -> None:
        """The server's writer mode, as its sessions say."""
        self._writer = writer

    def facts(self) -> TargetFacts:
        """Raises Unavailable when the cluster does not answer. The writer is known after the warm-up."""
        status = self._call(self._status())
        workers = status.cluster.workers
        return TargetFacts(
            name=f"grpc://{self.address}",
            model=status.model.name,
            vocab_size=status.model.vocab_size,
            writer=self._writer,
            dtype=status.model.dtype,
            kv_bytes=sum(worker.engine.kv_bytes_total for worker in workers),
            adapters=tuple(adapter.name for adapter in status.cluster.adapters),
        )

    def counters(self) -> EngineCounters:
        """Waits until no worker runs anything: a context pass may go on after the last turn."""
        return self._call(self._idle_counters())

    def load_adapters(self, paths: dict[str, str]) -> None:
        """Load what the cluster does not have yet. The paths are the workers'."""
        self._call(self._load_adapters(paths))

    def warm_up(self) -> None:
        self.run(WARM_UP, lambda num_ended: None)

    def run(self, trace: Trace, on_progress: OnProgress) -> RunRecord:
        return self._call(self._run(trace, on_progress))

    @staticmethod
    def _call(work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run(work)

    def client(self) -> AsyncForkKVClient:
        return AsyncForkKVClient(self.address, token=self.token)

    async def _run(self, trace: Trace, on_progress: OnProgress) -> RunRecord:
        async with self.client() as client:
            return await GrpcRun(self, client, trace, on_progress).run()

    async def _status(self) -> Status:
        async with self.client() as client:
            return await client.status()

    async def _load_adapters(self, paths: dict[str, str]) -> None:
        async with self.client() as client:
            present = {adapter.name for adapter in await client.list_adapters()}
            for name, path in paths.items():
                if name not in present:
                    await client.load_adapter(name, path)

    async def _idle_counters(self) -> EngineCounters:
        async with self.client() as client:
            status = await wait_until_idle(client)
        return add_counters(worker.engine.counters for worker in status.cluster.workers)
