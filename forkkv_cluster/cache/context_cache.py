"""Pages of shared context: what is here, and the passes that write what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from forkkv_cluster.cache.host_tier import HostEntry, HostTier, Slot
from forkkv_cluster.cache.kv_memory import KVMemory
from forkkv_cluster.cache.lease_book import LeaseBook
from forkkv_cluster.cache.leases import ContextLease, ContextMatch, ResidualPlan
from forkkv_cluster.cache.page_pool import PageClass
from forkkv_cluster.cache.tree_nodes import Node, PathRecord, Residual, ResidualKey
from forkkv_cluster.core.ids import BlockHash
from forkkv_cluster.core.prefix import PrefixKey, TokenArray, partial_hash


class HostRun(NamedTuple):
    """Entries that would complete shared context up to block ``reach``, and the prompt tokens that they save."""

    entries: list[HostEntry]
    reach: int
    num_bytes: int
    num_tokens: int


class ContextCache:
    """Matches shared context and opens ``ContextLease``s over one ``KVMemory``."""

    def __init__(self, memory: KVMemory, book: LeaseBook) -> None:
        self._memory = memory
        self._book = book
        self._tree = memory.tree
        self._page_size = memory.geometry.page_size

    def tail_hash(self, key: PrefixKey, tokens: TokenArray, context_len: int) -> BlockHash | None:
        """Hash of the context's partly filled last block, or None when the fork point is on a page border."""
        num_context = context_len // self._page_size
        if context_len % self._page_size == 0:
            return None
        parent = key.context[num_context - 1] if num_context else key.context_seed
        return partial_hash(parent, tokens[num_context * self._page_size : context_len])

    def match(self, key: PrefixKey, tokens: TokenArray, context_len: int, residual: ResidualKey | None) -> ContextMatch:
        """Tokens of tokens[:context_len] that are here; without ``residual`` its match is the base's."""
        blocks, tail = self._base_match(key, tokens, context_len)
        base_len = tail.end if tail is not None else len(blocks) * self._page_size
        if residual is None:
            return ContextMatch(base_len, base_len)
        return ContextMatch(base_len, self._residual_len(blocks, tail, residual))

    def open(
        self,
        key: PrefixKey,
        tokens: TokenArray,
        context_len: int,
        required: Sequence[ResidualKey],
        optional: Sequence[ResidualKey],
    ) -> ContextLease | None:
        """Claim pages for a pass over tokens[:context_len].

        It starts where base KV or the residual of a ``required`` key ends first. ``optional`` keys are projected in the
        same pass when their residual reaches that point and there is room for all of them. None when there is no room:
        then nothing is claimed.
        """
        blocks, tail = self._base_match(key, tokens, context_len)
        base_len = tail.end if tail is not None else len(blocks) * self._page_size
        run_start = min([base_len, *(self._residual_len(blocks, tail, k) for k in required)])
        plans = []
        for residual in dict.fromkeys((*required, *optional)):
            start = self._residual_len(blocks, tail, residual)
            if run_start <= start < context_len:
                plans.append(self._plan(blocks, start, residual, context_len))
        lease = self._lease(key, tokens, context_len, blocks, tail, run_start, plans)
        self._book.add(lease)
        if self._claim(lease) or (self._drop_optional(lease, required) and self._claim(lease)):
            return lease
        self._book.remove(lease)
        self._unpin(lease)
        self._memory.make_room_for_a_retry(self._book)
        return None

    def commit(self, lease: ContextLease, num_computed: int) -> None:
        """Rows before ``num_computed`` are written: file every block that is complete now, the tail at the very end."""
        while not lease.is_detached and lease.num_blocks_in_tree < lease.num_pages:
            if self._end(lease, lease.num_blocks_in_tree) > num_computed:
                break
            self._file_base(lease)
        for plan in lease.residuals:
            while plan.block < lease.num_blocks_in_tree and self._end(lease, plan.block) <= num_computed:
                self._file_residual(lease, plan)

    def release(self, lease: ContextLease, is_cold: bool = False) -> None:
        """Give back what was not filed; what was filed stays cached."""
        if lease.is_released:
            raise ValueError("lease released twice")
        lease.is_released = True
        self._book.remove(lease)
        self._memory.free(None, [int(p) for p in lease.record.pages[lease.num_blocks_in_tree : lease.num_pages]])
        for plan in lease.residuals:
            unfiled = plan.pages[plan.block : plan.num_pages]
            self._memory.free(plan.key.rank_class, [int(p) for p in unfiled])
        deepest = lease.pinned
        self._unpin(lease)
        if is_cold and deepest is not None:
            self._tree.cool(deepest)

    def restore(self, key: PrefixKey, tokens: TokenArray, context_len: int, residuals: Sequence[ResidualKey]) -> None:
        """Bring back from the host what would let a pass that needs ``residuals`` start later, if that is cheaper.

        All or nothing; nothing where there is no room for it.
        """
        host = self._memory.host
        if host is None or len(host) == 0:
            return
        blocks, tail = self._base_match(key, tokens, context_len)
        found = self._on_host(host, key, tokens, context_len, blocks, tail, residuals)
        if found.num_tokens <= 0 or not host.estimate.pays(found.num_bytes, found.num_tokens):
            return
        is_whole = found.reach * self._page_size >= context_len
        reach_len = min(found.reach * self._page_size, context_len)
        blocks, tail = blocks[: found.reach], tail if is_whole else None
        plans = [
            self._plan(blocks, 0, residual, reach_len)
            for residual in residuals
            if self._residual_len(blocks, tail, residual) < reach_len
        ]
        lease = self._lease(key, tokens, reach_len, blocks, tail, 0, plans)
        host.take(found.entries)
        self._book.add(lease)
        if self._claim(lease):
            self._swap_in(host, lease, found)
            self.release(lease)
            return
        self._book.remove(lease)
        self._unpin(lease)
        host.put_back(found.entries)

    # --- matching ---------------------------------------------------------------------------------------------------

    def _base_match(self, key: PrefixKey, tokens: TokenArray, context_len: int) -> tuple[Sequence[BlockHash], Node | None]:
        """Hashes of the whole blocks that are here, and the tail's node when all of the context is."""
        num_context = context_len // self._page_size
        chain = key.context[:num_context]
        node = self._tree.match(chain, tokens[:context_len])
        blocks = chain[: node.depth + 1] if node is not None else ()
        tail_hash = self.tail_hash(key, tokens, context_len)
        if tail_hash is None or len(blocks) < num_context:
            return blocks, None
        return blocks, self._tree.find(tail_hash, tokens[:context_len])

    def _residual_len(self, blocks: Sequence[BlockHash], tail: Node | None, key: ResidualKey) -> int:
        if tail is not None and key in tail.residuals:
            return tail.end
        entry = self._tree.match_residual(blocks, len(blocks), key)
        return (entry.node.depth + 1) * self._page_size if entry is not None else 0

    def _path(self, key: PrefixKey, tokens: TokenArray, context_len: int) -> list[BlockHash]:
        """Hashes of all blocks of the context, the partly filled tail's with them."""
        tail_hash = self.tail_hash(key, tokens, context_len)
        return [*key.context[: context_len // self._page_size], *((tail_hash,) if tail_hash is not None else ())]

    def slots(self, key: PrefixKey, tokens: TokenArray, context_len: int, residuals: Sequence[ResidualKey]) -> list[Slot]:
        """What the context consists of, block by block from its start: base KV, then the residuals over it."""
        kinds = (None, *dict.fromkeys(residuals))
        return [(block, kind) for block in self._path(key, tokens, context_len) for kind in kinds]

    # --- restoring --------------------------------------------------------------------------------------------------

    def _on_host(
        self,
        host: HostTier,
        key: PrefixKey,
        tokens: TokenArray,
        context_len: int,
        blocks: Sequence[BlockHash],
        tail: Node | None,
        residuals: Sequence[ResidualKey],
    ) -> HostRun:
        """What continues the device's match of base KV and of every one of ``residuals``, as far as all of them reach."""
        size, path, tokens = self._page_size, self._path(key, tokens, context_len), tokens[:context_len]
        num_here: dict[ResidualKey | None, int] = {None: len(blocks) + (tail is not None)}
        runs: dict[ResidualKey | None, list[HostEntry]] = {None: host.run(path[num_here[None] :], None, tokens)}
        for residual in dict.fromkeys(residuals):
            num_here[residual] = -(-self._residual_len(blocks, tail, residual) // size)
            runs[residual] = host.run(path[num_here[residual] :], residual, tokens)
        reach = min(num_here[kind] + len(run) for kind, run in runs.items())
        entries = [entry for kind, run in runs.items() for entry in run[: max(0, reach - num_here[kind])]]
        num_bytes = sum(self._memory.geometry.page_bytes(entry.page_class) for entry in entries)
        num_tokens = min(reach * size, context_len) - min(num_here.values()) * size
        return HostRun(entries, reach, num_bytes, num_tokens)

    def _swap_in(self, host: HostTier, lease: ContextLease, found: HostRun) -> None:
        """File every page of ``lease`` as the copy of its entry; the copies are made before the next step."""
        entries: dict[Slot, HostEntry] = {entry.slot: entry for entry in found.entries}
        while lease.num_blocks_in_tree < lease.num_pages:
            block = lease.num_blocks_in_tree
            self._file_base(lease)
            if lease.is_detached:
                break
            host.swap_in(entries.pop((self._hash(lease, block), None)), int(lease.record.pages[block]))
        for plan in lease.residuals:
            while plan.block < lease.num_blocks_in_tree:
                block = plan.block
                self._file_residual(lease, plan)
                host.swap_in(entries.pop((self._hash(lease, block), plan.key)), int(plan.pages[block]))
        host.give_up(list(entries.values()))

    # --- opening ----------------------------------------------------------------------------------------------------

    def _plan(self, blocks: Sequence[BlockHash], start: int, key: ResidualKey, context_len: int) -> ResidualPlan:
        num_pages = -(-context_len // self._page_size)
        pages = np.zeros(num_pages, dtype=np.int32)
        entry: Residual | None = self._tree.match_residual(blocks, len(blocks), key)
        block = 0
        if entry is not None:
            block = entry.node.depth + 1
            pages[:block] = entry.pages[:block]
            self._tree.pin(entry)
        return ResidualPlan(key, start, pages, block, block, entry)

    def _lease(
        self,
        key: PrefixKey,
        tokens: TokenArray,
        context_len: int,
        blocks: Sequence[BlockHash],
        tail: Node | None,
        run_start: int,
        plans: list[ResidualPlan],
    ) -> ContextLease:
        pages = np.zeros(-(-context_len // self._page_size), dtype=np.int32)
        record = PathRecord(tokens[:context_len], pages, key.owner)
        deepest = tail if tail is not None else (self._tree.find(blocks[-1], tokens) if blocks else None)
        num_blocks = 0
        if deepest is not None and deepest.record is not None:
            num_blocks = deepest.depth + 1
            record.pages[:num_blocks] = deepest.record.pages[:num_blocks]
            self._tree.pin(deepest)
        base_start = tail.end if tail is not None else len(blocks) * self._page_size
        return ContextLease(
            key,
            self.tail_hash(key, tokens, context_len),
            record,
            context_len,
            num_blocks,
            base_start,
            run_start,
            num_blocks,
            plans,
            deepest,
        )

    def _drop_optional(self, lease: ContextLease, required: Sequence[ResidualKey]) -> bool:
        """Take out the plans that nobody waits for; False when there are none."""
        dropped = [plan for plan in lease.residuals if plan.key not in required]
        lease.residuals = [plan for plan in lease.residuals if plan.key in required]
        for plan in dropped:
            if plan.pinned is not None:
                self._tree.unpin(plan.pinned)
        return bool(dropped)

    def _claim(self, lease: ContextLease) -> bool:
        total = len(lease.record.pages)
        demand: dict[PageClass, int] = {None: total - lease.num_pages}
        for plan in lease.residuals:
            demand[plan.key.rank_class] = demand.get(plan.key.rank_class, 0) + total - plan.block
        if not self._memory.fits(demand, self._book):
            return False
        claimed: list[tuple[PageClass, list[int]]] = []
        for page_class, count in demand.items():
            pages = self._memory.allocate(page_class, count)
            if pages is None:
                for taken_class, taken in claimed:
                    self._memory.free(taken_class, taken)
                return False
            claimed.append((page_class, pages))
        self._hand_out(lease, dict(claimed))
        return True

    def _hand_out(self, lease: ContextLease, claimed: dict[PageClass, list[int]]) -> None:
        total = len(lease.record.pages)
        lease.record.pages[lease.num_pages :] = claimed[None]
        lease.num_pages = total
        taken: dict[PageClass, int] = {}
        for plan in lease.residuals:
            first = taken.get(plan.key.rank_class, 0)
            plan.pages[plan.block :] = claimed[plan.key.rank_class][first : first + total - plan.block]
            plan.num_pages = total
            taken[plan.key.rank_class] = first + total - plan.block

    # --- filing -----------------------------------------------------------------------------------------------------

    def _end(self, lease: ContextLease, block: int) -> int:
        return min((block + 1) * self._page_size, lease.num_tokens)

    def _hash(self, lease: ContextLease, block: int) -> BlockHash:
        if block < lease.num_tokens // self._page_size:
            return lease.key.context[block]
        if lease.tail_hash is None:
            raise ValueError(f"context of {lease.num_tokens} tokens has no block {block}")
        return lease.tail_hash

    def _file_base(self, lease: ContextLease) -> None:
        block = lease.num_blocks_in_tree
        block_hash, end = self._hash(lease, block), self._end(lease, block)
        page = int(lease.record.pages[block])
        node = self._tree.find(block_hash, lease.record.tokens[:end])
        if node is None and block_hash in self._tree:
            lease.is_detached = True  # another block has the same hash: serve nothing rather than the wrong thing
            return
        if node is None:
            parent = self._hash(lease, block - 1) if block else lease.key.context_seed
            node = self._tree.insert(block_hash, parent, None, page, block, end, end - block * self._page_size, lease.record)
            self._memory.base_filed(node)
        elif node.page is not None and node.page != page:
            lease.record.pages[block] = node.page
            self._memory.free(None, [page])
        node.is_private_tail = False
        self._tree.pin(node)
        if lease.pinned is not None:
            self._tree.unpin(lease.pinned)
        lease.pinned = node
        lease.num_blocks_in_tree += 1

    def _file_residual(self, lease: ContextLease, plan: ResidualPlan) -> None:
        block_hash = self._hash(lease, plan.block)
        node = self._tree.node(block_hash)
        page = int(plan.pages[plan.block])
        entry = self._tree.add_residual(node, plan.key, page, plan.pages)
        if entry.page != page:
            plan.pages[plan.block] = entry.page
            self._memory.free(plan.key.rank_class, [page])
        else:
            self._memory.residual_filed(entry)
        self._tree.pin(entry)
        if plan.pinned is not None:
            self._tree.unpin(plan.pinned)
        plan.pinned = entry
        plan.block += 1

    # --- closing ----------------------------------------------------------------------------------------------------

    def _unpin(self, lease: ContextLease) -> None:
        for plan in lease.residuals:
            if plan.pinned is not None:
                self._tree.unpin(plan.pinned)
                plan.pinned = None
        if lease.pinned is not None:
            self._tree.unpin(lease.pinned)
            lease.pinned = None
