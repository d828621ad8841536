"""The router's brain without Serve: from a request and what workers report to an order of workers. Plain and local.

``place`` ranks; it notes the best worker at once, so that the next request of a burst already sees this one's prefix and
load there. ``routed`` says where the request really went, ``ended`` that it is over. An attempt that is never routed
(cancelled meanwhile) is forgotten by time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.ids import BlockHash, WorkerId
from forkkv_cluster.core.placement import Candidate, PlacementRequest, PrefixMatch, Ranked, WorkerLoad
from forkkv_cluster.core.ports import PrefixView
from forkkv_cluster.core.request import ContextRequest
from forkkv_cluster.routing.load_ledger import LoadLedger, SentWork
from forkkv_cluster.routing.placement_request import ResidualChain, WorkRequest, placement_request, residual_chains
from forkkv_cluster.routing.policy import PlacementPolicy, prefill_blocks


class SpeculativeView(PrefixView, Protocol):
    """A ``PrefixView`` that also takes hints of what was just routed (``directory.mirror``)."""

    def speculate(
        self, request_id: str, worker_id: WorkerId, chain: tuple[BlockHash, ...], residuals: Sequence[ResidualChain] = ()
    ) -> None: ...

    def end_speculation(self, request_id: str) -> None: ...

    def drop_worker(self, worker_id: WorkerId) -> None: ...


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker last said. ``block_bytes``: base KV of one block; 0 when not known."""

    worker_id: WorkerId
    load: WorkerLoad = field(default_factory=WorkerLoad)
    block_bytes: int = 0


class Placer:
    """One for each router. ``load_ttl_s``: until a worker's report shows what was sent to it, seconds."""

    def __init__(self, policy: PlacementPolicy, view: SpeculativeView, clock: Clock, load_ttl_s: float) -> None:
        self._policy = policy
        self._view = view
        self._ledger = LoadLedger(clock, load_ttl_s)

    def place(self, request: WorkRequest, reports: Sequence[WorkerReport], ticket: str) -> list[Ranked]:
        """Workers, best first: never empty unless ``reports`` is. Excluded workers are left out while others are there.

        ``ticket`` names this attempt in ``routed`` and ``ended``.
        """
        allowed = [report for report in reports if report.worker_id not in request.excluded_workers] or reports
        wanted = placement_request(request)
        self._ledger.ended(ticket)  # A retry of a rejected attempt must not see itself as load.
        candidates = [
            Candidate(r.worker_id, self._ledger.adjusted(r.worker_id, r.load, wanted.root), self._match(r.worker_id, wanted))
            for r in allowed
        ]
        ranked = self._policy.rank(wanted, candidates, max((report.block_bytes for report in allowed), default=0))
        if ranked:
            self._note(request, wanted, ranked[0].worker_id, ticket)
            self._view.end_speculation(ticket)
        return ranked

    def routed(self, request: WorkRequest, worker_id: WorkerId, ticket: str) -> None:
        """The attempt was accepted by ``worker_id``: its prefix counts as there while it runs."""
        self._note(request, placement_request(request), worker_id, ticket)
        self._ledger.accepted(ticket)

    def _note(self, request: WorkRequest, wanted: PlacementRequest, worker_id: WorkerId, ticket: str) -> None:
        if not self._ledger.is_on(ticket, worker_id):
            # Before speculating: afterwards all of the prefix counts as there.
            prefill = prefill_blocks(wanted, self._match(worker_id, wanted))
            is_pass = isinstance(request, ContextRequest)
            work = SentWork(wanted.root, prefill, 0.0 if is_pass else float(wanted.num_blocks), is_pass)
            self._ledger.sent(ticket, worker_id, work)
        self._view.speculate(ticket, worker_id, wanted.context + wanted.own, residual_chains(request))

    def ended(self, ticket: str) -> None:
        """The attempt is over, well or not. Unknown tickets are attempts without a prompt."""
        self._ledger.ended(ticket)
        self._view.end_speculation(ticket)

    def worker_died(self, worker_id: WorkerId) -> None:
        self._ledger.worker_died(worker_id)
        self._view.drop_worker(worker_id)

    def _match(self, worker_id: WorkerId, wanted: PlacementRequest) -> PrefixMatch:
        return self._view.match(
            worker_id,
            wanted.context + wanted.own,
            residual_of=wanted.residual_of,
            semantics=wanted.semantics,
            adapter=wanted.adapter,
        )
