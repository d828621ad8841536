"""The host tier: base and residual pages evicted from the device, in an arena of their own with its own budget and LRU.

A block is on the device or here, never both; here it is known to this worker alone, no directory hears of it. Whatever
is here has all it depends on, here or on the device: a base page the block before it, a residual page its base page and
the residual before it. So the host tier continues a device match, and what lost its support is dropped at once.

Bookkeeping only. Tokens are compared over the whole path before anything is given back, as the device's tree does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from forkkv_cluster.cache.eviction import LruList
from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.page_pool import PageClass, PagePool
from forkkv_cluster.cache.swap_estimate import SwapEstimate
from forkkv_cluster.cache.swaps import NO_SWAPS, SwapPlan, group_by_class
from forkkv_cluster.cache.tree_nodes import Node, Residual, ResidualKey
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.ids import BlockHash
from forkkv_cluster.core.prefix import TokenArray

Slot: TypeAlias = tuple[BlockHash, ResidualKey | None]
"""One page by what it holds: a block's base KV (None), or one adapter's residual over it."""


class HostEntry:
    """One page here. ``tokens`` is the append-only buffer of its path, of which the first ``end`` count; ``above`` is the
    block before it, None at the start of a sequence."""

    __slots__ = ("above", "end", "page", "slot", "tokens")

    def __init__(self, slot: Slot, above: BlockHash | None, tokens: TokenArray, end: int) -> None:
        self.slot = slot
        self.above = above
        self.tokens = tokens
        self.end = end
        self.page = 0

    @property
    def page_class(self) -> PageClass:
        key = self.slot[1]
        return key.rank_class if key is not None else None

    @property
    def needs(self) -> tuple[Slot, ...]:
        """What it is useless without."""
        block, key = self.slot
        own_base: tuple[Slot, ...] = ((block, None),) if key is not None else ()
        return own_base if self.above is None else (*own_base, (self.above, key))

    def holds(self, tokens: TokenArray) -> bool:
        return self.end <= len(tokens) and np.array_equal(self.tokens[: self.end], tokens[: self.end])


class HostTier:
    """Owns the host's page pool and the copies not made yet. Not thread-safe.

    Raises InvalidArgument when ``host_bytes`` hold not even one slab.
    """

    def __init__(self, geometry: KVGeometry, host_bytes: int) -> None:
        self.geometry = geometry
        self.pool = PagePool(geometry, num_host_slabs(geometry, host_bytes))
        self.estimate = SwapEstimate()
        self.num_swapped_out = 0
        self.num_swapped_in = 0
        self.swapped_out_bytes = 0
        self.swapped_in_bytes = 0
        self._entries: dict[Slot, HostEntry] = {}
        self._dependents: dict[Slot, dict[Slot, HostEntry]] = {}
        self._lru: LruList[HostEntry] = LruList()
        self._outs: dict[tuple[PageClass, int], int] = {}  # (class, host page) -> device page
        self._ins: dict[tuple[PageClass, int], HostEntry] = {}  # (class, device page) -> where it comes from

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, slot: object) -> bool:
        return slot in self._entries

    def entries(self) -> Iterator[HostEntry]:
        return iter(self._entries.values())

    def swap_ins(self) -> Iterator[tuple[PageClass, int, HostEntry]]:
        """Swap-ins that are not made yet: class, device page, and the entry that leaves."""
        return ((page_class, page, entry) for (page_class, page), entry in self._ins.items())

    def dependents(self, slot: Slot) -> Iterator[HostEntry]:
        """Entries that are useless without ``slot``."""
        return iter(self._dependents.get(slot, {}).values())

    def is_listed(self, entry: HostEntry) -> bool:
        """Whether the entry stands in the eviction order: leaves alone do."""
        return entry in self._lru

    @property
    def total_bytes(self) -> int:
        return self.pool.num_slabs * self.geometry.slab_bytes

    @property
    def bytes_held(self) -> int:
        classes = self.pool.page_classes()
        return sum(self.pool.num_allocated(c) * self.geometry.page_bytes(c) for c in classes)

    # --- what the device evicts -------------------------------------------------------------------------------------

    def store_base(self, node: Node) -> None:
        """The node leaves the device; it is still linked to its parent, and its page not yet free."""
        if node.page is None or node.record is None:
            raise ValueError("a seed node has no page to store")
        self._store(HostEntry((node.hash, None), _block_above(node), node.record.tokens, node.end), node.page)

    def store_residual(self, residual: Residual) -> None:
        """The residual leaves the device, its base page not yet."""
        node = residual.node
        if node.record is None:
            raise ValueError("a seed node has no residual to store")
        slot = (node.hash, residual.key)
        self._store(HostEntry(slot, _block_above(node), node.record.tokens, node.end), residual.page)

    def lose(self, slot: Slot) -> None:
        """``slot`` left the device and is not stored here: drop all that depended on it."""
        lost = [slot]
        while lost:
            for entry in list(self.dependents(lost.pop())):
                self._drop(entry)
                lost.append(entry.slot)

    def forget(self, slot: Slot) -> None:
        """``slot`` has been computed again on the device."""
        entry = self._entries.get(slot)
        if entry is not None:
            self._drop(entry)

    def _store(self, entry: HostEntry, device_page: int) -> None:
        returning = self._ins.pop((entry.page_class, device_page), None)
        if returning is not None:  # evicted before it came: its page here is still good, the one there is not
            self._file(returning)
            return
        page = self._allocate(entry.page_class)
        if page is None:  # and nothing is left here that depended on it: all that could go has gone
            return
        entry.page = page
        self._outs[entry.page_class, page] = device_page
        self._file(entry)

    def _allocate(self, page_class: PageClass) -> int | None:
        while True:
            pages = self.pool.allocate(page_class, 1)
            if pages is not None:
                return pages[0]
            oldest = self._lru.oldest()
            if oldest is None:
                return None
            self._drop(oldest)

    # --- what the device asks back ----------------------------------------------------------------------------------

    def run(self, hashes: Sequence[BlockHash], key: ResidualKey | None, tokens: TokenArray) -> list[HostEntry]:
        """Entries of consecutive blocks, as many of the first of ``hashes`` as are here with exactly these tokens."""
        found = []
        for block in hashes:
            entry = self._entries.get((block, key))
            if entry is None or not entry.holds(tokens):
                break
            found.append(entry)
        return found

    def take(self, entries: Sequence[HostEntry]) -> None:
        """They are to be swapped in: none may be evicted from here meanwhile. ``swap_in`` or ``put_back`` follows."""
        for entry in reversed(entries):
            self._remove(entry)

    def put_back(self, entries: Sequence[HostEntry]) -> None:
        """Undo ``take``."""
        for entry in entries:
            self._file(entry)

    def give_up(self, entries: Sequence[HostEntry]) -> None:
        """Taken, but the device has something else under the same hash (a collision)."""
        for entry in entries:
            self._free(entry)

    def swap_in(self, entry: HostEntry, device_page: int) -> None:
        """A taken entry's page is the device's from now on."""
        self._ins[entry.page_class, device_page] = entry

    def take_swaps(self) -> SwapPlan:
        """All copies decided since the last call. They must be made before pages are next written."""
        if not self._outs and not self._ins:
            return NO_SWAPS
        outs = group_by_class((c, device, host) for (c, host), device in self._outs.items())
        ins = group_by_class((c, device, entry.page) for (c, device), entry in self._ins.items())
        self.num_swapped_out += len(self._outs)
        self.num_swapped_in += len(self._ins)
        self.swapped_out_bytes += SwapPlan(outs).num_bytes(self.geometry)
        self.swapped_in_bytes += SwapPlan((), ins).num_bytes(self.geometry)
        self._outs.clear()
        for entry in self._ins.values():
            self._free(entry)
        self._ins.clear()
        return SwapPlan(outs, ins)

    # --- index ------------------------------------------------------------------------------------------------------

    def _file(self, entry: HostEntry) -> None:
        self.forget(entry.slot)  # another path with the same hash
        self._entries[entry.slot] = entry
        for need in entry.needs:
            self._dependents.setdefault(need, {})[entry.slot] = entry
            if need in self._entries:
                self._lru.discard(self._entries[need])
        if entry.slot not in self._dependents:
            self._lru.add_newest(entry)

    def _remove(self, entry: HostEntry) -> None:
        del self._entries[entry.slot]
        self._lru.discard(entry)
        for need in entry.needs:
            below = self._dependents[need]
            del below[entry.slot]
            if not below:
                del self._dependents[need]
                if need in self._entries:
                    self._lru.add_oldest(self._entries[need])  # used with what hung on it: it goes next

    def _drop(self, entry: HostEntry) -> None:
        self._remove(entry)
        self._free(entry)

    def _free(self, entry: HostEntry) -> None:
        self._outs.pop((entry.page_class, entry.page), None)
        self.pool.free(entry.page_class, [entry.page])


def num_host_slabs(geometry: KVGeometry, host_bytes: int) -> int:
    """Whole slabs in ``host_bytes``. Raises InvalidArgument when not even one fits."""
    if host_bytes < geometry.slab_bytes:
        raise InvalidArgument(
            "cache.host_bytes",
            host_bytes,
            f"is less than one slab ({geometry.slab_bytes} bytes)",
            "Give the host tier more memory, or 0 to do without it.",
        )
    return host_bytes // geometry.slab_bytes


def _block_above(node: Node) -> BlockHash | None:
    above = node.parent
    while above is not None and above.page is None:
        above = above.parent
    return above.hash if above is not None else None
