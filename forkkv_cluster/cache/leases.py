"""Leases: the objects that prove a claim on KV memory. Opened and released by the KVCacheManager, exactly once each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from forkkv_cluster.cache.merged_keys import MergedUse
from forkkv_cluster.cache.tree_nodes import Node, PageTable, PathRecord, Residual, ResidualKey
from forkkv_cluster.core.ids import BlockHash
from forkkv_cluster.core.prefix import PrefixKey


@dataclass(frozen=True, slots=True)
class TailSource:
    """Where the first tokens of a sequence's first private page come from: a copy, before the first step.

    ``is_context``: the source holds shared base KV of context; the copy is merged with the adapter's residual.
    """

    node: Node
    num_tokens: int
    is_context: bool
    residual: Residual | None = None


@dataclass(slots=True, eq=False)
class SequenceLease:
    """Pages of one sequence: a pinned path in the tree, then private pages.

    tokens [capacity] int32, pages [capacity pages] int32: append-only buffers, shared with the tree's nodes.
    num_blocks_in_tree: leading pages that the tree owns; pages [num_blocks_in_tree, num_pages) are private.
    hashes: chain of the whole blocks known so far, of which ``key`` gave the first.
    residual_pages [n] int32: the adapter's residual over the n whole blocks of shared context; empty when not needed.
    merged_keys: the adapter's whole K over those blocks, for this step; None where it is to be built from both.
    """

    key: PrefixKey
    record: PathRecord
    hashes: list[BlockHash]
    num_pages: int
    num_blocks_in_tree: int
    num_computed: int
    pinned: Node | None = None
    residual_pin: Residual | None = None
    residual_pages: PageTable = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    tail: TailSource | None = None
    merged_keys: MergedUse | None = None
    is_detached: bool = False
    is_released: bool = False

    @property
    def pages(self) -> PageTable:
        """Page table so far, [num_pages] int32, a view."""
        return self.record.pages[: self.num_pages]


@dataclass(slots=True, eq=False)
class ResidualPlan:
    """One adapter's residual in a context pass: rows from ``start`` on are written, block ``block`` is filed next.

    pages [pages of the context] int32, of which the first ``num_pages`` are claimed.
    """

    key: ResidualKey
    start: int
    pages: PageTable
    block: int
    num_pages: int
    pinned: Residual | None = None


@dataclass(slots=True, eq=False)
class ContextLease:
    """Pages of one pass over shared context of ``num_tokens`` tokens.

    Rows [run_start, num_tokens) run; rows from ``base_start`` on write base KV; ``residuals`` says who is projected.
    num_blocks_in_tree: leading base pages that the tree owns.
    """

    key: PrefixKey
    tail_hash: BlockHash | None
    record: PathRecord
    num_tokens: int
    num_pages: int
    base_start: int
    run_start: int
    num_blocks_in_tree: int
    residuals: list[ResidualPlan]
    pinned: Node | None = None
    is_detached: bool = False
    is_released: bool = False

    @property
    def pages(self) -> PageTable:
        return self.record.pages[: self.num_pages]


@dataclass(frozen=True, slots=True)
class ContextMatch:
    """Tokens of a shared context that are here: ``base_len``, and ``residual_len`` of one adapter (at most base_len)."""

    base_len: int
    residual_len: int
