"""A local, possibly stale copy of the directory, so that routing needs no call: implements ``core.ports.PrefixView``.

Written by one follower (``directory.client.follow``), read by routers, possibly in another thread: reads look single
keys up in dicts and never iterate, so no lock is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from forkkv_cluster.core.clock import Clock, SystemClock
from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId
from forkkv_cluster.core.placement import PrefixMatch
from forkkv_cluster.directory.changes import Delta, apply_change
from forkkv_cluster.directory.matching import match_worker
from forkkv_cluster.directory.speculation import Speculation
from forkkv_cluster.directory.worker_blocks import WorkerBlocks


class DirectoryMirror:
    """Empty at first: it then matches nothing, and placement goes by load and rendezvous alone."""

    def __init__(self, speculative_ttl_s: float, clock: Clock | None = None) -> None:
        self._workers: dict[WorkerId, WorkerBlocks] = {}
        self._speculation = Speculation(clock or SystemClock(), speculative_ttl_s)
        self._incarnation = ""
        self._version = 0

    @property
    def incarnation(self) -> str:
        """Of the directory that this follows; empty before the first delta."""
        return self._incarnation

    @property
    def version(self) -> int:
        return self._version

    @property
    def worker_ids(self) -> frozenset[WorkerId]:
        return frozenset(self._workers)

    def apply(self, delta: Delta) -> bool:
        """Follow ``delta``. False, and nothing changes, when it does not continue from here: ask for a snapshot."""
        if delta.is_snapshot:
            workers: dict[WorkerId, WorkerBlocks] = {}
            for change in delta.changes:
                apply_change(workers, change)
            self._workers = workers
        elif delta.incarnation == self._incarnation and delta.since == self._version:
            for change in delta.changes:
                apply_change(self._workers, change)
        else:
            return False
        self._incarnation, self._version = delta.incarnation, delta.version
        return True

    def match(
        self,
        worker_id: WorkerId,
        chain: Sequence[BlockHash],
        *,
        residual_of: AdapterDigest | None,
        semantics: str,
        adapter: AdapterDigest | None,
    ) -> PrefixMatch:
        """What is there or, by what was just routed, will be when the request arrives. Mutates nothing, never raises."""
        known = match_worker(self._workers.get(worker_id), chain, residual_of, semantics, adapter)
        # Both are prefix-closed, so their union reaches as far as the longer of the two.
        base = max(known.base_blocks, self._speculation.base_len(worker_id, chain))
        if residual_of is None:
            return PrefixMatch(base, base, known.is_adapter_resident)
        residual = max(known.residual_blocks, self._speculation.residual_len(worker_id, chain[:base], residual_of, semantics))
        return PrefixMatch(base, residual, known.is_adapter_resident)

    def speculate(
        self,
        request_id: str,
        worker_id: WorkerId,
        chain: tuple[BlockHash, ...],
        residuals: Iterable[tuple[AdapterDigest, str, tuple[BlockHash, ...]]] = (),
    ) -> None:
        """Count what ``request_id`` will write on ``worker_id`` as there already; see ``Speculation.start``."""
        self._speculation.start(request_id, worker_id, chain, residuals)

    def end_speculation(self, request_id: str) -> None:
        """The request ended; its entry expires ``speculative_ttl_s`` later."""
        self._speculation.end(request_id)

    def drop_worker(self, worker_id: WorkerId) -> None:
        """The worker was seen to die; the directory will say so too, later."""
        self._workers.pop(worker_id, None)
        self._speculation.drop_worker(worker_id)
