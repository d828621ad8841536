"""Values of the routing decision: what is to be placed, and what a worker would have to pay for it."""

from __future__ import annotations

from dataclasses import dataclass

from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """The part of a request that routing may look at.

    context, own      chained hashes of its whole blocks (``core.prefix.PrefixKey``)
    residual_of       the adapter whose residual the context needs, or None (base model, isolated, base, no LoRA on k/v)
    adapter           the adapter that must be resident, or None
    semantics         residual semantics: ``eager`` or ``residual``
    num_blocks        all blocks of the prompt, the partly filled one included
    """

    request_id: str
    context: tuple[BlockHash, ...]
    own: tuple[BlockHash, ...]
    adapter: AdapterDigest | None
    residual_of: AdapterDigest | None
    semantics: str
    num_blocks: int

    @property
    def root(self) -> BlockHash | None:
        """First block: ties and cold requests rendezvous on it, so that one context meets on one worker."""
        chain = self.context or self.own
        return chain[0] if chain else None


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker last said of its load, in blocks of ``block_size`` tokens.

    queued_prefill_blocks   prompt blocks admitted or waiting that have not run yet
    decode_blocks           blocks of context that running sequences attend to
    """

    queued_prefill_blocks: float = 0.0
    decode_blocks: float = 0.0
    num_active: int = 0
    free_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the directory believes a worker has of one request, in leading blocks. A hint, never the truth."""

    base_blocks: int = 0
    residual_blocks: int = 0
    is_adapter_resident: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker that could take the request."""

    worker_id: WorkerId
    load: WorkerLoad
    match: PrefixMatch


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its cost, as ``routing.policy`` computed it; ``terms`` explains the sum."""

    worker_id: WorkerId
    cost: float
    terms: dict[str, float]
