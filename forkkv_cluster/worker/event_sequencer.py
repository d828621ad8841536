"""Which events go to the directory next, and when a snapshot is due. Pure: no clock, no network.

    idle -> take() -> (in flight) -> acknowledged(expected) or failed()

At most one batch is in flight. Events wait here while the directory is away, up to a bound counted in block hashes;
beyond it they are dropped and a snapshot, which says the same, goes instead.
"""

from __future__ import annotations

from collections import deque

from forkkv_cluster.core.events import BaseEvicted, BaseStored, CacheEvent, EventBatch, ResidualEvicted, ResidualStored
from forkkv_cluster.core.ids import WorkerId

_WITH_HASHES = (BaseStored, BaseEvicted, ResidualStored, ResidualEvicted)


class EventSequencer:
    """Begins by needing a snapshot: the directory may be new, or know an earlier life of this worker."""

    def __init__(self, worker_id: WorkerId, epoch: int, *, max_pending_hashes: int = 1_000_000) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._max_pending_hashes = max_pending_hashes
        self._pending: deque[CacheEvent] = deque()
        self._pending_hashes = 0
        self._first_seq = 0
        self._needs_snapshot = True
        self._num_acknowledged = 0

    @property
    def needs_snapshot(self) -> bool:
        """The next thing to send is a snapshot, not ``take``."""
        return self._needs_snapshot

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    @property
    def num_acknowledged(self) -> int:
        """Events that the directory has, by batch or by snapshot."""
        return self._num_acknowledged

    def record(self, first_seq: int, events: tuple[CacheEvent, ...]) -> None:
        """The engine has emitted ``events``, numbered from ``first_seq``; those that a snapshot covered are skipped."""
        next_seq = self._first_seq + len(self._pending)
        if first_seq > next_seq:
            # Unseen numbers: only a snapshot can say what they were.
            self._drop_pending(first_seq)
            next_seq = first_seq
        for event in events[next_seq - first_seq :]:
            self._pending.append(event)
            self._pending_hashes += _num_hashes(event)
        if self._pending_hashes > self._max_pending_hashes:
            self._drop_pending(self._first_seq + len(self._pending))

    def take(self) -> EventBatch:
        """All that waits, oldest first; without any, an empty batch: a sign of life. Keeps it until acknowledged."""
        return EventBatch(self._worker_id, self._epoch, self._first_seq, tuple(self._pending))

    def take_snapshot(self, seq: int, events: tuple[CacheEvent, ...]) -> EventBatch:
        """The state as of before event ``seq``; what waited and is older is covered by it."""
        self._discard_before(seq)
        return EventBatch(self._worker_id, self._epoch, seq, events, is_snapshot=True)

    def acknowledged(self, batch: EventBatch, expected: int) -> None:
        """The directory took ``batch`` and expects ``expected``; fewer than it was sent means: send a snapshot."""
        end = batch.first_seq if batch.is_snapshot else batch.first_seq + len(batch.events)
        self._needs_snapshot = expected < end
        if not self._needs_snapshot:
            self._num_acknowledged = max(self._num_acknowledged, end)
            self._discard_before(end)

    def _discard_before(self, seq: int) -> None:
        while self._pending and self._first_seq < seq:
            self._pending_hashes -= _num_hashes(self._pending.popleft())
            self._first_seq += 1
        self._first_seq = max(self._first_seq, seq)

    def _drop_pending(self, next_seq: int) -> None:
        self._pending.clear()
        self._pending_hashes = 0
        self._first_seq = next_seq
        self._needs_snapshot = True


def _num_hashes(event: CacheEvent) -> int:
    return 1 + (len(event.hashes) if isinstance(event, _WITH_HASHES) else 0)
