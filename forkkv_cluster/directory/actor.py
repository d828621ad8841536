"""The directory as a Ray actor: a plain asynchronous class around ``DirectoryIndex``, then its remote shell.

One named, detached actor for each application. It holds nothing that the workers could not tell again: when it is lost,
routing goes on from the mirrors, it comes back empty under a new incarnation, and the workers re-send snapshots.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from forkkv_cluster.core.clock import Clock, SystemClock
from forkkv_cluster.core.events import EventBatch
from forkkv_cluster.core.ids import WorkerId, new_id
from forkkv_cluster.core.status import DirectoryStatus
from forkkv_cluster.directory.changes import Delta
from forkkv_cluster.directory.index import DirectoryIndex

NAMESPACE = "forkkv-cluster"
"""Ray namespace of every directory: explicit, because replicas and drivers live in namespaces of their own."""

DEFAULT_LEASE_S = 30.0
"""A worker that says nothing for this long is forgotten; publishers speak at least three times as often."""


def directory_name(app_name: str) -> str:
    """Name of the actor that serves the application ``app_name``."""
    return f"forkkv-directory:{app_name}"


class DirectoryActor:
    """One loop, no awaits inside a change: each call sees the index whole."""

    def __init__(self, lease_s: float = DEFAULT_LEASE_S, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lease_s = lease_s
        self._index = DirectoryIndex(new_id("directory"))
        self._changed = asyncio.Event()
        self._announced_version = 0

    async def apply(self, batch: EventBatch) -> int:
        """See ``DirectoryIndex.apply``: the sequence number expected next."""
        expected = self._index.apply(batch, self._clock.monotonic())
        self._after_change()
        return expected

    async def deltas(self, incarnation: str, version: int, timeout_s: float) -> Delta:
        """Changes since ``version``; waits up to ``timeout_s`` for the first, then answers with none."""
        self._after_change()
        delta = self._index.deltas(incarnation, version)
        if not delta.changes and not delta.is_snapshot and timeout_s > 0:
            await self._wait_for_change(timeout_s)
            delta = self._index.deltas(incarnation, version)
        return delta

    async def status(self) -> DirectoryStatus:
        self._after_change()
        return self._index.status()

    async def drop_worker(self, worker_id: WorkerId) -> bool:
        """Forget a worker that is known to be dead. False when it is not known."""
        was_known = self._index.drop_worker(worker_id)
        self._after_change()
        return was_known

    def _after_change(self) -> None:
        """Forget silent workers, and wake the mirrors that wait when anything is new."""
        self._index.drop_silent(self._clock.monotonic(), self._lease_s)
        if self._index.version != self._announced_version:
            self._announced_version = self._index.version
            # Who waits holds the old event; who comes later waits for the next change.
            self._changed.set()
            self._changed = asyncio.Event()

    async def _wait_for_change(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            self._after_change()


def get_or_create(name: str, lease_s: float = DEFAULT_LEASE_S) -> Any:
    """The actor's handle. Blocks for a round trip to Ray's control store: call it in a thread from async code.

    No CPU is reserved, so that it never waits for one; Ray restarts it, empty, when its process dies.
    """
    remote_class = ray.remote(DirectoryActor)
    options = remote_class.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
    )
    return options.remote(lease_s)
