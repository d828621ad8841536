"""Where KV lives: the one door of ``cache`` for the scheduler.

Opening a lease is all or nothing; ``None`` means "not now". Each lease is released exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence

from forkkv_cluster.cache.context_cache import ContextCache
from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.holdings import Holdings
from forkkv_cluster.cache.host_tier import HostTier
from forkkv_cluster.cache.invariants import check_invariants
from forkkv_cluster.cache.kv_memory import KVMemory
from forkkv_cluster.cache.lease_book import LeaseBook
from forkkv_cluster.cache.leases import ContextLease, ContextMatch, SequenceLease
from forkkv_cluster.cache.merged_keys import MergedIdentity
from forkkv_cluster.cache.page_pool import PageClass
from forkkv_cluster.cache.sequence_cache import SequenceCache
from forkkv_cluster.cache.swap_estimate import SwapEstimate
from forkkv_cluster.cache.swaps import NO_SWAPS, SwapPlan
from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.events import CacheEvent
from forkkv_cluster.core.prefix import PrefixKey, TokenArray
from forkkv_cluster.core.status import PoolStatus


class KVCacheManager:
    """Pages of one engine. Pure bookkeeping: page ids, no tensors. Not thread-safe."""

    def __init__(self, geometry: KVGeometry, kv_bytes: int, host_bytes: int = 0, merged_share: float = 0.5) -> None:
        """``host_bytes``: budget of the host tier, 0 for none. ``merged_share``: of kv_bytes, at most, that whole K of adapters
        may borrow while it is free (``MergedKeys``). Raises InvalidArgument when a budget holds no slab."""
        self.geometry = geometry
        self._memory = KVMemory(geometry, kv_bytes, host_bytes, merged_share)
        self._book = LeaseBook()
        self._sequences = SequenceCache(self._memory, self._book)
        self._contexts = ContextCache(self._memory, self._book)

    # --- shared context ---------------------------------------------------------------------------------------------

    def match_context(self, key: PrefixKey, tokens: TokenArray, context_len: int, residual: ResidualKey | None) -> ContextMatch:
        """How much of tokens[:context_len] is here. Mutates nothing."""
        return self._contexts.match(key, tokens, context_len, residual)

    def restore_context(
        self, key: PrefixKey, tokens: TokenArray, context_len: int, residuals: Sequence[ResidualKey] = ()
    ) -> None:
        """Bring back from the host what of a context is cheaper to copy than to run; ``match_context`` sees it then."""
        self._contexts.restore(key, tokens, context_len, residuals)

    def keep_context(
        self,
        name: str,
        key: PrefixKey,
        tokens: TokenArray,
        context_len: int,
        residuals: Sequence[ResidualKey],
        expires_s: float,
    ) -> None:
        """A session's hint: evict this context after all others until ``expires_s``, or until it is released."""
        self._memory.keep(name, self._contexts.slots(key, tokens, context_len, residuals), expires_s)

    def release_hint(self, name: str) -> None:
        """The session needs its context no longer. Unknown names are ignored."""
        self._memory.release_hint(name)

    def expire_hints(self, now_s: float) -> None:
        """End the hints that have run out by ``now_s``."""
        self._memory.expire_hints(now_s)

    def open_context(
        self,
        key: PrefixKey,
        tokens: TokenArray,
        context_len: int,
        required: Sequence[ResidualKey] = (),
        optional: Sequence[ResidualKey] = (),
    ) -> ContextLease | None:
        """Claim pages for a pass over tokens[:context_len]; see ``ContextCache.open``."""
        return self._contexts.open(key, tokens, context_len, required, optional)

    def commit_context(self, lease: ContextLease, num_computed: int) -> None:
        """Rows before ``num_computed`` are written; file every block that is complete."""
        self._contexts.commit(lease, num_computed)

    def release_context(self, lease: ContextLease, *, is_cold: bool = False) -> None:
        """End of the pass: what was filed stays cached, the rest is freed. ``is_cold``: it is evicted before all else."""
        self._contexts.release(lease, is_cold)

    # --- sequences --------------------------------------------------------------------------------------------------

    def open_sequence(
        self,
        key: PrefixKey,
        tokens: TokenArray,
        num_tokens: int,
        context_len: int,
        residual: ResidualKey | None,
        max_cached: int | None = None,
        *,
        is_private: bool = False,
    ) -> SequenceLease | None:
        """Claim pages for tokens[:num_tokens]; ``tokens`` [capacity] int32 is the sequence's append-only buffer.

        ``context_len`` is 0 where nothing is shared. Its context must match in full (``match_context``), unless the sequence
        runs what is missing as its canonical writer does (an aLoRA, before its invocation). ``max_cached`` tokens are taken
        from the cache at most: the caller wants to see the others run. ``is_private``: nothing that it writes is filed.
        """
        tail_hash = self._contexts.tail_hash(key, tokens, context_len)
        lease = self._sequences.open(key, tokens, num_tokens, residual, tail_hash, context_len, max_cached)
        if lease is not None and is_private:
            lease.is_detached = True
        return lease

    def grow(self, lease: SequenceLease, num_tokens: int) -> bool:
        """Make room for tokens up to ``num_tokens``; False, and no change, when there is none."""
        return self._sequences.grow(lease, num_tokens)

    def commit(self, lease: SequenceLease, num_computed: int) -> None:
        """KV of tokens[:num_computed] is written; file every block that is whole."""
        self._sequences.commit(lease, num_computed)

    def release(self, lease: SequenceLease, *, is_cold: bool = False) -> None:
        """The sequence has ended or is preempted: what was computed stays cached, the rest is freed. ``is_cold``: what it has
        filed is evicted before all else."""
        self._sequences.release(lease, is_cold)

    # --- merged keys ------------------------------------------------------------------------------------------------

    def start_merged_step(self) -> None:
        """``use_merged_keys`` is about to be called for the turns of a new step."""
        self._memory.merged.start_step()

    def use_merged_keys(self, lease: SequenceLease, is_worth_making: bool) -> None:
        """Set ``lease.merged_keys`` for the step that is about to run: no allocation may come between the two."""
        entry = lease.residual_pin
        lease.merged_keys = None
        if entry is not None and len(lease.residual_pages):
            num_tokens = len(lease.residual_pages) * self.geometry.page_size
            lease.merged_keys = self._memory.merged.use(MergedIdentity(entry.key, entry.node.hash), num_tokens, is_worth_making)

    def note_merged_keys_written(self) -> None:
        """The step has run all layers: what it used and was not written is now."""
        self._memory.merged.note_written()

    @property
    def merged_bytes_held(self) -> int:
        """Bytes that whole K of adapters borrows, of memory that nobody else needs now."""
        return self._memory.merged.bytes_held

    # --- host tier --------------------------------------------------------------------------------------------------

    def take_swaps(self) -> SwapPlan:
        """Copies decided since the last call: to be made before pages are next written."""
        return self._memory.host.take_swaps() if self._memory.host is not None else NO_SWAPS

    @property
    def swap_estimate(self) -> SwapEstimate | None:
        """Where measured rates go; None without a host tier."""
        return self._memory.host.estimate if self._memory.host is not None else None

    @property
    def host(self) -> HostTier | None:
        """The host tier's own facts; None without one."""
        return self._memory.host

    # --- facts ------------------------------------------------------------------------------------------------------

    def take_events(self) -> tuple[CacheEvent, ...]:
        """What changed since the last call."""
        return self._memory.events.take()

    def snapshot_events(self) -> tuple[CacheEvent, ...]:
        """Everything that is here, as events."""
        return self._memory.snapshot_events()

    def check_invariants(self) -> None:
        """Raise Internal if the bookkeeping contradicts itself."""
        check_invariants(self._memory, self._book)

    @property
    def num_leases(self) -> int:
        return len(self._book)

    @property
    def num_evictions(self) -> int:
        return self._memory.num_evictions

    @property
    def holdings(self) -> Holdings:
        """Bytes of filed pages by owner and adapter, and what sharing saves."""
        return self._memory.holdings

    def bytes_by_owner(self) -> dict[str, int]:
        """Bytes by the tenant who first needed them, pages that leases have not filed yet included. O(leases)."""
        return dict(self._memory.holdings.by_owner + self._book.unfiled_bytes(self.geometry))

    def kept_bytes(self) -> dict[str, int]:
        """Bytes that each hint covers, by name."""
        return self._memory.hints.bytes_by_name()

    @property
    def total_bytes(self) -> int:
        return self._memory.total_bytes

    @property
    def base_bytes_held(self) -> int:
        return self._memory.base_bytes_held

    @property
    def residual_bytes_held(self) -> int:
        return self._memory.residual_bytes_held

    @property
    def peak_bytes(self) -> tuple[int, int]:
        """Largest base and residual bytes ever held."""
        return self._memory.peak_base_bytes, self._memory.peak_residual_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that no lease protects: free, or cached and evictable. O(pages of all leases)."""
        pinned = sum(self.geometry.page_bytes(c) * n for c, n in self._book.pinned_pages().items())
        return self.total_bytes - pinned

    def pools(self) -> tuple[PoolStatus, ...]:
        """Every pool, base first, then the slabs that merged keys borrow. total = free + cached + pinned in each."""
        pinned = self._book.pinned_pages()
        classes: list[PageClass] = [None, *sorted(c for c in self._memory.pool.page_classes() if c is not None)]
        merged = self._memory.merged.num_slabs
        borrowed = [PoolStatus("merged-keys", self.geometry.slab_bytes, merged, 0, merged, 0)] if merged else []
        return (*(self._pool_status(c, pinned.get(c, 0)) for c in classes), *borrowed)

    def _pool_status(self, page_class: PageClass, num_pinned: int) -> PoolStatus:
        pool = self._memory.pool
        allocated, free = pool.num_allocated(page_class), pool.num_allocatable(page_class)
        name = "base" if page_class is None else f"residual-r{page_class}"
        return PoolStatus(
            name, self.geometry.page_bytes(page_class), allocated + free, free, allocated - num_pinned, num_pinned
        )
