"""What one worker holds: base blocks, residual blocks per (adapter, semantics), resident adapters. Pure bookkeeping.

One dict maps each base block to a bit mask of the residuals over it. So a residual cannot outlive its base block, base
eviction costs one lookup however many adapters there are, and a block costs one dict entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import assert_never

from forkkv_cluster.core.events import (
    AdapterLoaded,
    AdapterUnloaded,
    BaseEvicted,
    BaseStored,
    CacheEvent,
    Cleared,
    ResidualEvicted,
    ResidualStored,
)
from forkkv_cluster.core.ids import AdapterDigest, BlockHash

ResidualKey = tuple[AdapterDigest, str]
"""(adapter digest, semantics). The two semantics never serve each other."""


def longest_prefix(chain: Sequence[BlockHash], holds: Callable[[BlockHash], object]) -> int:
    """How many leading blocks of ``chain`` are held, by binary search: log2(n) calls of ``holds``.

    Right when what is held is prefix-closed, which leaf-first eviction gives. Where lost events have left a hole, the
    answer may be too long or too short; it is a hint, and the worker matches again.
    """
    low, high = 0, len(chain)
    while low < high:
        middle = (low + high) // 2
        if holds(chain[middle]):
            low = middle + 1
        else:
            high = middle
    return low


class WorkerBlocks:
    """Mutable. Every event is idempotent. Readers in other threads see each block before or after a change."""

    __slots__ = ("_adapters", "_bits", "_free_bits", "_masks", "_num_residual")

    def __init__(self, events: Iterable[CacheEvent] = ()) -> None:
        self._masks: dict[BlockHash, int] = {}
        self._bits: dict[ResidualKey, int] = {}
        self._num_residual: dict[int, int] = {}
        self._free_bits: list[int] = []
        self._adapters: set[AdapterDigest] = set()
        for event in events:
            self.apply(event)

    @property
    def num_base_blocks(self) -> int:
        return len(self._masks)

    @property
    def num_residual_blocks(self) -> int:
        return sum(self._num_residual.values())

    def base_len(self, chain: Sequence[BlockHash]) -> int:
        """Leading blocks of ``chain`` with base KV here."""
        return longest_prefix(chain, self._masks.__contains__)

    def residual_len(self, chain: Sequence[BlockHash], key: ResidualKey) -> int:
        """Leading blocks of ``chain`` with this residual here; base KV is then here too."""
        bit = self._bits.get(key)
        if bit is None:
            return 0
        masks = self._masks
        return longest_prefix(chain, lambda block: masks.get(block, 0) & bit)

    def has_adapter(self, adapter: AdapterDigest) -> bool:
        return adapter in self._adapters

    def apply(self, event: CacheEvent) -> None:
        match event:
            case BaseStored(hashes):
                for block in hashes:
                    self._masks.setdefault(block, 0)
            case BaseEvicted(hashes):
                for block in hashes:
                    self._count_out(self._masks.pop(block, 0))
            case ResidualStored(adapter, semantics, hashes):
                self._store_residual((adapter, semantics), hashes)
            case ResidualEvicted(adapter, semantics, hashes):
                self._evict_residual((adapter, semantics), hashes)
            case AdapterLoaded(adapter):
                self._adapters.add(adapter)
            case AdapterUnloaded(adapter):
                self._adapters.discard(adapter)
            case Cleared():
                self._masks, self._bits, self._num_residual, self._free_bits = {}, {}, {}, []
            case _:
                assert_never(event)

    def events(self) -> tuple[CacheEvent, ...]:
        """The whole state as events: applied to an empty table they give this one."""
        stored: list[CacheEvent] = [AdapterLoaded(adapter) for adapter in sorted(self._adapters)]
        if self._masks:
            stored.append(BaseStored(tuple(self._masks)))
        for (adapter, semantics), bit in self._bits.items():
            stored.append(ResidualStored(adapter, semantics, tuple(b for b, mask in self._masks.items() if mask & bit)))
        return tuple(stored)

    def _store_residual(self, key: ResidualKey, hashes: tuple[BlockHash, ...]) -> None:
        held = [block for block in hashes if block in self._masks]
        if not held:
            return
        bit = self._bits.get(key)
        if bit is None:
            bit = self._free_bits.pop() if self._free_bits else 1 << len(self._bits)
            self._bits[key], self._num_residual[bit] = bit, 0
        for block in held:
            mask = self._masks[block]
            if not mask & bit:
                self._masks[block] = mask | bit
                self._num_residual[bit] += 1

    def _evict_residual(self, key: ResidualKey, hashes: tuple[BlockHash, ...]) -> None:
        bit = self._bits.get(key)
        if bit is None:
            return
        for block in hashes:
            mask = self._masks.get(block, 0)
            if mask & bit:
                self._masks[block] = mask & ~bit
                self._count_out(bit)

    def _count_out(self, mask: int) -> None:
        """One block fewer under every bit of ``mask``. A bit without blocks is free for another adapter."""
        while mask:
            bit = mask & -mask
            mask ^= bit
            self._num_residual[bit] -= 1
            if self._num_residual[bit] == 0:
                del self._num_residual[bit]
                del self._bits[next(key for key, value in self._bits.items() if value == bit)]
                self._free_bits.append(bit)
