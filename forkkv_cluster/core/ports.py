"""The borders that have more than one implementation. Each says what it mutates and what it raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from forkkv_cluster.core.events import EventBatch
from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId
from forkkv_cluster.core.placement import PrefixMatch


class PrefixView(Protocol):
    """A local, possibly stale view of the directory. Never blocks and never raises."""

    def match(
        self,
        worker_id: WorkerId,
        chain: Sequence[BlockHash],
        *,
        residual_of: AdapterDigest | None,
        semantics: str,
        adapter: AdapterDigest | None,
    ) -> PrefixMatch:
        """Leading blocks of ``chain`` on that worker. Mutates nothing."""
        ...


class EventSink(Protocol):
    """Where a worker's events go."""

    async def apply(self, batch: EventBatch) -> int:
        """Apply and return the sequence number expected next; a smaller one than sent asks for a snapshot.

        Raises ``Unavailable`` when the sink is away; the caller keeps the events and tries again.
        """
        ...
