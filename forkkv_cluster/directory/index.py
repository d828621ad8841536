"""Which worker holds which leading blocks: the directory without its actor. Pure, single-threaded, no clock of its own.

Two keys: base blocks carry no adapter; residual blocks carry (adapter digest, semantics).

Workers number their events (``core.events``). The index answers each batch with the number it expects next:

* the batch follows on, or repeats what is known    applied once; the number after its last event
* the batch leaves a gap                            not applied; a number smaller than ``first_seq``: send a snapshot
* a snapshot                                        replaces the worker's state as of *before* event ``first_seq``;
                                                    it takes no numbers, so ``first_seq`` itself is expected next
* a newer epoch                                     all that the worker said before is dropped
* an older epoch                                    ignored: it comes from a life that is over

Mirrors follow ``deltas(incarnation, version)``. The log is bounded in block hashes; who is too far behind, or comes
from another incarnation, gets a snapshot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from forkkv_cluster.core.events import EventBatch
from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId
from forkkv_cluster.core.placement import PrefixMatch
from forkkv_cluster.core.status import DirectoryStatus
from forkkv_cluster.directory.changes import Change, Delta, WorkerDropped, apply_change, num_hashes
from forkkv_cluster.directory.matching import match_worker
from forkkv_cluster.directory.worker_blocks import WorkerBlocks


@dataclass(slots=True)
class _WorkerLife:
    """One epoch of one worker, as far as numbering goes."""

    epoch: int
    next_seq: int
    heard_s: float


class DirectoryIndex:
    """``now_s`` in calls is any monotonic clock, in seconds; it serves ``drop_silent`` alone."""

    def __init__(self, incarnation: str, *, max_log_hashes: int = 500_000) -> None:
        self.incarnation = incarnation
        self._max_log_hashes = max_log_hashes
        self._lives: dict[WorkerId, _WorkerLife] = {}
        self._blocks: dict[WorkerId, WorkerBlocks] = {}
        self._log: deque[Change] = deque()
        self._log_hashes = 0
        self._version = 0

    @property
    def version(self) -> int:
        """Number of changes logged so far."""
        return self._version

    def apply(self, batch: EventBatch, now_s: float = 0.0) -> int:
        """Apply ``batch`` and return the expected next sequence number; see the module's table. Never raises."""
        life = self._lives.get(batch.worker_id)
        if life is not None and batch.epoch < life.epoch:
            return batch.first_seq + len(batch.events)
        if life is None or batch.epoch > life.epoch:
            self.drop_worker(batch.worker_id)
            life = self._lives[batch.worker_id] = _WorkerLife(batch.epoch, 0, now_s)
            self._blocks[batch.worker_id] = WorkerBlocks()
        life.heard_s = now_s
        if batch.is_snapshot:
            return self._apply_snapshot(life, batch)
        return self._apply_events(life, batch)

    def _apply_snapshot(self, life: _WorkerLife, batch: EventBatch) -> int:
        if batch.first_seq >= life.next_seq:
            self._commit(batch)
            life.next_seq = batch.first_seq
        return life.next_seq

    def _apply_events(self, life: _WorkerLife, batch: EventBatch) -> int:
        if batch.first_seq > life.next_seq:
            return life.next_seq
        fresh = batch.events[life.next_seq - batch.first_seq :]
        if fresh:
            self._commit(EventBatch(batch.worker_id, batch.epoch, life.next_seq, fresh))
            life.next_seq += len(fresh)
        return life.next_seq

    def drop_worker(self, worker_id: WorkerId) -> bool:
        """Forget a worker. False when it is not known."""
        if self._lives.pop(worker_id, None) is None:
            return False
        self._commit(WorkerDropped(worker_id))
        return True

    def drop_silent(self, now_s: float, lease_s: float) -> tuple[WorkerId, ...]:
        """Forget the workers that have said nothing, not even an empty batch, for longer than ``lease_s``."""
        silent = tuple(w for w, life in self._lives.items() if now_s - life.heard_s > lease_s)
        for worker_id in silent:
            self.drop_worker(worker_id)
        return silent

    def _commit(self, change: Change) -> None:
        apply_change(self._blocks, change)
        self._log.append(change)
        self._log_hashes += num_hashes(change)
        self._version += 1
        while self._log_hashes > self._max_log_hashes:
            self._log_hashes -= num_hashes(self._log.popleft())

    def deltas(self, incarnation: str, version: int) -> Delta:
        """What a mirror at ``version`` of ``incarnation`` lacks; possibly nothing, possibly a snapshot."""
        num_missing = self._version - version
        if incarnation != self.incarnation or not 0 <= num_missing <= len(self._log):
            return self.snapshot()
        start = len(self._log) - num_missing
        changes = tuple(self._log[i] for i in range(start, len(self._log)))
        return Delta(self.incarnation, version, self._version, changes)

    def snapshot(self) -> Delta:
        """The whole state: one snapshot batch for each worker."""
        changes = tuple(
            EventBatch(worker_id, life.epoch, life.next_seq, self._blocks[worker_id].events(), is_snapshot=True)
            for worker_id, life in self._lives.items()
        )
        return Delta(self.incarnation, 0, self._version, changes, is_snapshot=True)

    def match(
        self,
        worker_id: WorkerId,
        chain: Sequence[BlockHash],
        *,
        residual_of: AdapterDigest | None,
        semantics: str,
        adapter: AdapterDigest | None,
    ) -> PrefixMatch:
        """See ``core.ports.PrefixView``."""
        return match_worker(self._blocks.get(worker_id), chain, residual_of, semantics, adapter)

    def status(self) -> DirectoryStatus:
        return DirectoryStatus(
            incarnation=self.incarnation,
            version=self._version,
            num_workers=len(self._lives),
            num_base_blocks=sum(blocks.num_base_blocks for blocks in self._blocks.values()),
            num_residual_blocks=sum(blocks.num_residual_blocks for blocks in self._blocks.values()),
        )
