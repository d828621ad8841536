"""Load that this router has just sent to workers, and what of a worker's queue a request would only share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.ids import BlockHash, WorkerId
from forkkv_cluster.core.placement import WorkerLoad


@dataclass(frozen=True, slots=True)
class SentWork:
    """Work of one attempt, in blocks. ``root`` is its first block; a context pass ends when its prefill does."""

    root: BlockHash | None
    prefill_blocks: float
    decode_blocks: float
    is_context_pass: bool = False


@dataclass(slots=True)
class _WorkerEntries:
    """By ticket: (expiry, work) of what no report shows yet, oldest first; and context passes that run."""

    recent: dict[str, tuple[float, SentWork]] = field(default_factory=dict)
    passes: dict[str, SentWork] = field(default_factory=dict)


class LoadLedger:
    """Reports arrive every fraction of a second, requests of one fork within milliseconds.

    An entry counts for ``ttl_s``, by when a report includes it, or until its request ends. Counting a request twice for
    a moment spreads load a little; counting it never would send a whole burst to one worker.

    Queued prefill of the *same* prefix is not competition: the request waits for it and then has it for nothing, which
    ends sooner than running it again elsewhere. So it is not counted, neither what was just sent nor, while a context
    pass runs, its part of the queue that the worker reports.
    """

    def __init__(self, clock: Clock, ttl_s: float) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._workers: dict[WorkerId, _WorkerEntries] = {}
        self._worker_of: dict[str, WorkerId] = {}

    def sent(self, ticket: str, worker_id: WorkerId, work: SentWork) -> None:
        """The attempt ``ticket`` goes to ``worker_id``; this replaces what was noted of it before."""
        self.ended(ticket)
        entries = self._workers.setdefault(worker_id, _WorkerEntries())
        entries.recent[ticket] = (self._clock.monotonic() + self._ttl_s, work)
        self._worker_of[ticket] = worker_id

    def accepted(self, ticket: str) -> None:
        """The worker has taken the attempt: a context pass is now known to run until it ends."""
        entries = self._workers[self._worker_of[ticket]]
        _, work = entries.recent[ticket]
        if work.is_context_pass:
            entries.passes[ticket] = work

    def is_on(self, ticket: str, worker_id: WorkerId) -> bool:
        """Whether the attempt is noted as just sent to this worker."""
        return self._worker_of.get(ticket) == worker_id and ticket in self._workers[worker_id].recent

    def ended(self, ticket: str) -> None:
        """The attempt is over: its work counts no more. Unknown tickets have expired, or carried no prompt."""
        worker_id = self._worker_of.pop(ticket, None)
        if worker_id is not None:
            self._workers[worker_id].recent.pop(ticket, None)
            self._workers[worker_id].passes.pop(ticket, None)

    def worker_died(self, worker_id: WorkerId) -> None:
        entries = self._workers.pop(worker_id, _WorkerEntries())
        for ticket in (*entries.recent, *entries.passes):
            self._worker_of.pop(ticket, None)

    def adjusted(self, worker_id: WorkerId, load: WorkerLoad, root: BlockHash | None) -> WorkerLoad:
        """``load`` as a request with this ``root`` would find it once what was sent has arrived."""
        entries = self._workers.get(worker_id)
        if entries is None:
            return load
        self._purge(entries)
        recent = [work for _, work in entries.recent.values()]
        shared = sum(p.prefill_blocks for t, p in entries.passes.items() if p.root == root and t not in entries.recent)
        queued = max(0.0, load.queued_prefill_blocks - shared)
        return replace(
            load,
            queued_prefill_blocks=queued + sum(work.prefill_blocks for work in recent if work.root != root),
            decode_blocks=load.decode_blocks + sum(work.decode_blocks for work in recent),
            num_active=load.num_active + len(recent),
        )

    def _purge(self, entries: _WorkerEntries) -> None:
        now = self._clock.monotonic()
        while entries.recent:
            ticket, (expiry_s, _) = next(iter(entries.recent.items()))
            if expiry_s > now:
                return
            del entries.recent[ticket]
            if ticket not in entries.passes:
                del self._worker_of[ticket]
