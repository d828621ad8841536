"""Which worker should take a request: pure scoring by the marginal cost of placing *this* request there.

In blocks of ``block_size`` tokens, for a worker with B base and R residual blocks of a request of n blocks:

    useful  = min(B, R) as ``semantics`` says        prefill = n - useful, less what present base KV saves
    cost    = scale * (queued prefill + prefill) + decode blocks + active_weight * active requests
              + memory_weight * min(1, new bytes / free bytes) + adapter_load_blocks if the adapter is not resident

Ties go by rendezvous hash of the prefix root, so that routers which know nothing still agree. A worker whose queued
prefill exceeds the least loaded one's by more than ``spill_blocks`` comes after all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import xxhash

from forkkv_cluster.core.config import RoutingConfig
from forkkv_cluster.core.ids import BlockHash, WorkerId
from forkkv_cluster.core.placement import Candidate, PlacementRequest, PrefixMatch, Ranked

SAVED_BY_BASE = 0.03
"""Part of a block's prefill that present base KV saves a pass which must run for its residual: the product with W_k and
W_v, 1.6 to 4.3 % of the linear FLOPs."""

_COST_DIGITS = 6
"""Costs equal to this many decimals are a tie: sums of floats in another order differ in the last bits."""


def useful_blocks(request: PlacementRequest, match: PrefixMatch) -> int:
    """Leading blocks that run through no layer: min(base, residual), where residuals matter for the context only."""
    num_context = len(request.context)
    if request.residual_of is None or match.residual_blocks >= num_context:
        return match.base_blocks
    return min(match.base_blocks, match.residual_blocks)


def prefill_blocks(request: PlacementRequest, match: PrefixMatch) -> float:
    """Blocks of prefill work that the worker would still have to do for this request."""
    useful = min(useful_blocks(request, match), request.num_blocks)
    base_only = min(match.base_blocks, request.num_blocks) - useful
    return request.num_blocks - useful - SAVED_BY_BASE * base_only


def cost_terms(request: PlacementRequest, candidate: Candidate, config: RoutingConfig, block_bytes: int) -> dict[str, float]:
    """The summands of the cost, by name. ``block_bytes``: base KV of one block over all layers; 0 when not known."""
    load, match = candidate.load, candidate.match
    new_bytes = block_bytes * max(0, request.num_blocks - match.base_blocks)
    # A full pool evicts: beyond all that is free, more new bytes cost no more.
    pressure = min(1.0, new_bytes / load.free_bytes) if load.free_bytes > 0 else float(load.total_bytes > 0 and new_bytes > 0)
    return {
        "queued": config.prefill_scale * load.queued_prefill_blocks,
        "prefill": config.prefill_scale * prefill_blocks(request, match),
        "decode": load.decode_blocks,
        "active": config.active_weight * load.num_active,
        "memory": config.memory_weight * pressure,
        "adapter": 0.0 if match.is_adapter_resident else config.adapter_load_blocks,
    }


def rendezvous(root: BlockHash | None, worker_id: WorkerId) -> int:
    """Weight of a worker for a prefix; the highest wins. Losing a worker moves only what it had."""
    return xxhash.xxh3_64_intdigest((root or b"") + worker_id.encode())


def rank(
    request: PlacementRequest, candidates: Sequence[Candidate], config: RoutingConfig, block_bytes: int = 0
) -> list[Ranked]:
    """All candidates, best first. The result does not depend on their order."""
    if not candidates:
        return []
    least_queued = min(candidate.load.queued_prefill_blocks for candidate in candidates)
    keyed = []
    for candidate in candidates:
        terms = cost_terms(request, candidate, config, block_bytes)
        ranked = Ranked(candidate.worker_id, sum(terms.values()), terms)
        is_spilled = candidate.load.queued_prefill_blocks - least_queued > config.spill_blocks
        tie = -rendezvous(request.root, candidate.worker_id)
        keyed.append(((is_spilled, round(ranked.cost, _COST_DIGITS), tie, candidate.worker_id), ranked))
    return [ranked for _, ranked in sorted(keyed, key=lambda pair: pair[0])]


class PlacementPolicy(Protocol):
    """Ranks candidates, best first. May keep state of its own between calls."""

    def rank(self, request: PlacementRequest, candidates: Sequence[Candidate], block_bytes: int) -> list[Ranked]: ...


class PrefixAffinity:
    """``rank``, with its configuration."""

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config

    def rank(self, request: PlacementRequest, candidates: Sequence[Candidate], block_bytes: int) -> list[Ranked]:
        return rank(request, candidates, self._config, block_bytes)


class RoundRobin:
    """Each request to the next worker, whatever it holds: for comparison."""

    def __init__(self) -> None:
        self._turn = 0

    def rank(self, request: PlacementRequest, candidates: Sequence[Candidate], block_bytes: int) -> list[Ranked]:
        if not candidates:
            return []
        workers = sorted(candidate.worker_id for candidate in candidates)
        start = self._turn % len(workers)
        self._turn += 1
        order = workers[start:] + workers[:start]
        return [Ranked(worker_id, float(place), {"turn": float(place)}) for place, worker_id in enumerate(order)]


def make_policy(config: RoutingConfig) -> PlacementPolicy:
    """The policy that the configuration names."""
    return RoundRobin() if config.policy == "round_robin" else PrefixAffinity(config)
