"""Sends a worker's cache events to the directory: after commit, in order, in batches; keeps them while it is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from forkkv_cluster.core.errors import Unavailable
from forkkv_cluster.core.events import CacheEvent, EventBatch
from forkkv_cluster.core.ids import WorkerId
from forkkv_cluster.core.ports import EventSink
from forkkv_cluster.worker.event_sequencer import EventSequencer

logger = logging.getLogger(__name__)

Snapshot = Callable[[], Awaitable[tuple[int, tuple[CacheEvent, ...]]]]
"""The whole cache as events, and the number of the first event that it does not cover."""


class EventPublisher:
    """The asynchronous shell around ``EventSequencer``. ``run`` until cancelled; ``record`` from the same loop.

    heartbeat_s   an empty batch at least this often: the directory forgets who is silent, and a directory that came
                  back empty answers it with a gap, which brings the snapshot
    coalesce_s    events of this long travel together
    retry_s       pause while the directory is away
    """

    def __init__(
        self,
        worker_id: WorkerId,
        epoch: int,
        sink: EventSink,
        snapshot: Snapshot,
        *,
        heartbeat_s: float = 2.0,
        coalesce_s: float = 0.005,
        retry_s: float = 0.5,
    ) -> None:
        self._sequencer = EventSequencer(worker_id, epoch)
        self._sink = sink
        self._snapshot = snapshot
        self._heartbeat_s = heartbeat_s
        self._coalesce_s = coalesce_s
        self._retry_s = retry_s
        self._has_news = asyncio.Event()
        self._is_away = False

    @property
    def num_published(self) -> int:
        """Events that the directory has acknowledged."""
        return self._sequencer.num_acknowledged

    def record(self, first_seq: int, events: tuple[CacheEvent, ...]) -> None:
        """Queue events that the engine has committed, numbered from ``first_seq``."""
        self._sequencer.record(first_seq, events)
        self._has_news.set()

    async def run(self) -> None:
        while True:
            is_delivered = await self._publish_once()
            if not is_delivered:
                await asyncio.sleep(self._retry_s)
            elif not self._sequencer.needs_snapshot:
                await self._wait_for_news()

    async def _publish_once(self) -> bool:
        """Send what is due. False when the directory is away; nothing is lost then."""
        batch = await self._next_batch()
        try:
            expected = await self._sink.apply(batch)
        except Unavailable as error:
            if not self._is_away:
                logger.warning("the directory is away; events wait: %s", error)
            self._is_away = True
            return False
        self._is_away = False
        self._sequencer.acknowledged(batch, expected)
        return True

    async def _next_batch(self) -> EventBatch:
        self._has_news.clear()
        if self._sequencer.needs_snapshot:
            return self._sequencer.take_snapshot(*await self._snapshot())
        return self._sequencer.take()

    async def _wait_for_news(self) -> None:
        try:
            async with asyncio.timeout(self._heartbeat_s):
                await self._has_news.wait()
        except TimeoutError:
            return
        await asyncio.sleep(self._coalesce_s)
