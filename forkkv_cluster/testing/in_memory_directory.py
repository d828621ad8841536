"""A directory without an actor: a naive dict of sets. An ``EventSink`` for publishers, and the model for index tests.

Deliberately shares no code with ``forkkv_cluster.directory``: it is what that package is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from forkkv_cluster.core.errors import Unavailable
from forkkv_cluster.core.events import (
    AdapterLoaded,
    AdapterUnloaded,
    BaseEvicted,
    BaseStored,
    CacheEvent,
    Cleared,
    EventBatch,
    ResidualEvicted,
    ResidualStored,
)
from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId
from forkkv_cluster.core.placement import PrefixMatch


@dataclass(slots=True)
class WorkerRecord:
    """All that one worker has said in its present epoch."""

    epoch: int
    next_seq: int = 0
    base: set[BlockHash] = field(default_factory=set)
    residual: dict[tuple[AdapterDigest, str], set[BlockHash]] = field(default_factory=dict)
    adapters: set[AdapterDigest] = field(default_factory=set)

    def forget_pages(self) -> None:
        self.base.clear()
        self.residual.clear()

    def apply(self, event: CacheEvent) -> None:
        if isinstance(event, BaseStored):
            self.base |= set(event.hashes)
        elif isinstance(event, BaseEvicted):
            self.base -= set(event.hashes)
            for blocks in self.residual.values():
                blocks -= set(event.hashes)
        elif isinstance(event, ResidualStored):
            # Inclusion: a residual page never exists without its base page.
            self.residual.setdefault((event.adapter, event.semantics), set()).update(self.base & set(event.hashes))
        elif isinstance(event, ResidualEvicted):
            self.residual.setdefault((event.adapter, event.semantics), set()).difference_update(event.hashes)
        elif isinstance(event, AdapterLoaded):
            self.adapters.add(event.adapter)
        elif isinstance(event, AdapterUnloaded):
            self.adapters.discard(event.adapter)
        elif isinstance(event, Cleared):
            self.forget_pages()


class InMemoryDirectory:
    """``workers`` is open to tests; set ``is_away`` and every call raises ``Unavailable``, as a lost actor does."""

    def __init__(self) -> None:
        self.workers: dict[WorkerId, WorkerRecord] = {}
        self.batches: list[EventBatch] = []
        self.is_away = False

    def restart(self) -> None:
        """Come back empty, as the actor does after a crash."""
        self.workers.clear()
        self.is_away = False

    async def apply(self, batch: EventBatch) -> int:
        """See ``core.ports.EventSink``."""
        if self.is_away:
            raise Unavailable("the directory is away. Keep the events and send them again.")
        self.batches.append(batch)
        return self.apply_now(batch)

    def apply_now(self, batch: EventBatch) -> int:
        """The same, without a loop: the next expected sequence number."""
        record = self.workers.get(batch.worker_id)
        if record is not None and batch.epoch < record.epoch:
            return batch.first_seq + len(batch.events)
        if record is None or batch.epoch > record.epoch:
            record = self.workers[batch.worker_id] = WorkerRecord(batch.epoch)
        if batch.is_snapshot:
            if batch.first_seq >= record.next_seq:
                record.forget_pages()
                record.adapters.clear()
                for event in batch.events:
                    record.apply(event)
                record.next_seq = batch.first_seq
            return record.next_seq
        if batch.first_seq > record.next_seq:
            return record.next_seq
        for event in batch.events[record.next_seq - batch.first_seq :]:
            record.apply(event)
            record.next_seq += 1
        return record.next_seq

    def drop_worker(self, worker_id: WorkerId) -> None:
        self.workers.pop(worker_id, None)

    def match(
        self,
        worker_id: WorkerId,
        chain: Sequence[BlockHash],
        *,
        residual_of: AdapterDigest | None,
        semantics: str,
        adapter: AdapterDigest | None,
    ) -> PrefixMatch:
        """See ``core.ports.PrefixView``; scans block by block."""
        record = self.workers.get(worker_id)
        if record is None:
            return PrefixMatch(is_adapter_resident=adapter is None)
        base = _leading(chain, record.base)
        residual = base if residual_of is None else _leading(chain, record.residual.get((residual_of, semantics), set()))
        return PrefixMatch(base, residual, adapter is None or adapter in record.adapters)


def _leading(chain: Sequence[BlockHash], held: set[BlockHash]) -> int:
    count = 0
    for block in chain:
        if block not in held:
            break
        count += 1
    return count
