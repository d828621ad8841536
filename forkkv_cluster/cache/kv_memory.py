"""The pool and the tree together: allocation that evicts (to the host tier, where there is one), the events it causes,
what is kept for longer, and the bytes it holds."""

from __future__ import annotations

from forkkv_cluster.cache.dual_radix_tree import DualRadixTree
from forkkv_cluster.cache.event_log import EventLog
from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.holdings import Holdings
from forkkv_cluster.cache.host_tier import HostTier, Slot
from forkkv_cluster.cache.keep_hints import KeepHints
from forkkv_cluster.cache.lease_book import LeaseBook
from forkkv_cluster.cache.merged_keys import MergedKeys
from forkkv_cluster.cache.page_pool import PageClass, PagePool
from forkkv_cluster.cache.tree_nodes import Node, Residual
from forkkv_cluster.core.events import CacheEvent

MAX_KEPT_FRACTION = 0.5
"""Of the pool: what hints may cover together."""


class KVMemory:
    """Owns the page pool, the DualRadixTree and the host tier of one engine. Not thread-safe."""

    def __init__(self, geometry: KVGeometry, kv_bytes: int, host_bytes: int = 0, merged_share: float = 0.5) -> None:
        """``merged_share``: of the memory, at most, that ``MergedKeys`` may borrow."""
        self.geometry = geometry
        self.pool = PagePool(geometry, geometry.num_slabs(kv_bytes))
        self.merged = MergedKeys(geometry, self.pool, merged_share)
        self.tree = DualRadixTree(self._base_evicted, self._residual_evicted)
        self.num_evictions = 0
        self.peak_base_bytes = 0
        self.peak_residual_bytes = 0
        self.events = EventLog()
        self.host = HostTier(geometry, host_bytes) if host_bytes else None
        self.hints = KeepHints(int(self.total_bytes * MAX_KEPT_FRACTION))
        self.holdings = Holdings(geometry)

    # --- allocation -----------------------------------------------------------------------------------------------

    def allocate(self, page_class: PageClass, num_pages: int) -> list[int] | None:
        """``num_pages`` pages, taking back merged keys and then evicting the least recently used as needed; None when pinned
        pages leave no room."""
        # Counted, not tried: on a full pool, trying again after each of thousands of evictions took seconds.
        while self.pool.num_allocatable(page_class) < num_pages:
            if not self.merged.give_back() and not self.tree.evict_oldest():
                return None
        pages = self.pool.allocate(page_class, num_pages)
        if pages is not None:
            self._note_peaks()
        return pages

    def free(self, page_class: PageClass, pages: list[int]) -> None:
        self.pool.free(page_class, pages)

    def fits(self, demand: dict[PageClass, int], book: LeaseBook) -> bool:
        """Whether the demand (pages by class) could be met once everything that no lease protects is evicted.

        A necessary condition, checked before eviction starts, so that a request that cannot fit evicts nothing.
        """
        if self.pool.has_room(demand):
            return True
        page_bytes = self.geometry.page_bytes
        wanted = sum(page_bytes(c) * n for c, n in demand.items())
        pinned = sum(page_bytes(c) * n for c, n in book.pinned_pages().items())
        return wanted + pinned <= self.total_bytes

    def make_room_for_a_retry(self, book: LeaseBook) -> None:
        """After a refusal with no lease open: evict everything, so that the same request starts from an empty pool.

        What a request matches can lie scattered over slabs of other classes, and can include a tail that is only to be
        copied. With nothing else running, no release would ever come to change that.
        """
        while len(book) == 0 and self.tree.evict_oldest():
            pass

    # --- filing and evicting ----------------------------------------------------------------------------------------

    def base_filed(self, node: Node) -> None:
        """A new node is in the tree: tell whoever has to know."""
        if self.is_whole(node):
            self.events.base_stored(node.hash)
        self.holdings.base_filed(node)
        if self.host is not None:
            self.host.forget((node.hash, None))
        if len(self.hints):
            self.tree.set_kept(node, (node.hash, None) in self.hints)

    def residual_filed(self, residual: Residual) -> None:
        """A new residual is in the tree."""
        node = residual.node
        if self.is_whole(node):
            self.events.residual_stored(residual.key, node.hash)
        self.holdings.residual_filed(residual)
        if self.host is not None:
            self.host.forget((node.hash, residual.key))
        if len(self.hints):
            self.tree.set_kept(residual, (node.hash, residual.key) in self.hints)

    def _base_evicted(self, node: Node) -> None:
        if node.page is not None:
            if self.host is not None and not node.is_private_tail:
                self.host.store_base(node)
            elif self.host is not None:
                self.host.lose((node.hash, None))
            self.pool.free(None, [node.page])
        self.num_evictions += 1
        self.holdings.base_evicted(node)
        if self.is_whole(node):
            self.events.base_evicted(node.hash)

    def _residual_evicted(self, residual: Residual) -> None:
        if self.host is not None:
            self.host.store_residual(residual)
        self.pool.free(residual.key.rank_class, [residual.page])
        self.num_evictions += 1
        self.holdings.residual_evicted(residual)
        if self.is_whole(residual.node):
            self.events.residual_evicted(residual.key, residual.node.hash)

    # --- hints ------------------------------------------------------------------------------------------------------

    def keep(self, name: str, slots: list[Slot], expires_s: float) -> None:
        """Evict these pages after all others until ``expires_s``; see ``KeepHints``."""
        page_bytes = self.geometry.page_bytes
        pages = ((slot, page_bytes(slot[1].rank_class if slot[1] is not None else None)) for slot in slots)
        added, released = self.hints.put(name, pages, expires_s)
        self._set_kept(added, True)
        self._set_kept(released, False)

    def release_hint(self, name: str) -> None:
        self._set_kept(self.hints.release(name), False)

    def expire_hints(self, now_s: float) -> None:
        self._set_kept(self.hints.expire(now_s), False)

    def _set_kept(self, slots: set[Slot], is_kept: bool) -> None:
        for block, key in slots:
            if block in self.tree:
                node = self.tree.node(block)
                entry = node if key is None else node.residuals.get(key)
                if entry is not None:
                    self.tree.set_kept(entry, is_kept)

    # --- accounting -----------------------------------------------------------------------------------------------

    @property
    def total_bytes(self) -> int:
        return self.pool.num_slabs * self.geometry.slab_bytes

    @property
    def base_bytes_held(self) -> int:
        """Bytes of base pages in use, cached ones included."""
        return self.pool.num_allocated(None) * self.geometry.page_bytes(None)

    @property
    def residual_bytes_held(self) -> int:
        """Bytes of residual pages in use, cached ones included."""
        classes = (c for c in self.pool.page_classes() if c is not None)
        return sum(self.pool.num_allocated(c) * self.geometry.page_bytes(c) for c in classes)

    def _note_peaks(self) -> None:
        self.peak_base_bytes = max(self.peak_base_bytes, self.base_bytes_held)
        self.peak_residual_bytes = max(self.peak_residual_bytes, self.residual_bytes_held)

    # --- events ---------------------------------------------------------------------------------------------------

    def is_whole(self, node: Node) -> bool:
        """Whole blocks are announced; partly filled tails are known to this worker alone."""
        return node.length == self.geometry.page_size

    def snapshot_events(self) -> tuple[CacheEvent, ...]:
        """The whole state as events, parents before children."""
        log = EventLog()
        nodes = sorted((n for n in self.tree.nodes() if self.is_whole(n)), key=lambda n: n.depth)
        for node in nodes:
            log.base_stored(node.hash)
        for key in {key for node in nodes for key in node.residuals}:
            for node in nodes:
                if key in node.residuals:
                    log.residual_stored(key, node.hash)
        return log.take()
