"""Pages of sequences: match, claim, grow, file what was computed, release."""

from __future__ import annotations

import numpy as np

from forkkv_cluster.cache.kv_memory import KVMemory
from forkkv_cluster.cache.lease_book import LeaseBook
from forkkv_cluster.cache.leases import SequenceLease, TailSource
from forkkv_cluster.cache.tree_nodes import Node, PathRecord, ResidualKey
from forkkv_cluster.core.ids import BlockHash
from forkkv_cluster.core.prefix import PrefixKey, TokenArray, hash_blocks, partial_hash


class SequenceCache:
    """Opens and closes ``SequenceLease``s over one ``KVMemory``."""

    def __init__(self, memory: KVMemory, book: LeaseBook) -> None:
        self._memory = memory
        self._book = book
        self._tree = memory.tree
        self._page_size = memory.geometry.page_size

    def open(
        self,
        key: PrefixKey,
        tokens: TokenArray,
        num_tokens: int,
        residual: ResidualKey | None,
        context_tail_hash: BlockHash | None,
        context_len: int = 0,
        max_cached: int | None = None,
    ) -> SequenceLease | None:
        """Claim pages for tokens[:num_tokens]; ``tokens`` [capacity] int32 is the sequence's append-only buffer.

        At least the last token is left to run: its logits are wanted; with ``max_cached`` all but that many. Shared
        context must be here already (``ContextCache``), or be run by the sequence as its canonical writer does; with
        ``residual`` its pages of that adapter too. None when there is no room: then nothing is claimed, and the context has
        to be looked for again before a retry.
        """
        reusable = num_tokens - 1 if max_cached is None else min(max_cached, num_tokens - 1)
        lease = self._matched(key, tokens, num_tokens, residual, context_tail_hash, context_len, reusable)
        self._book.add(lease)
        wanted = -(-num_tokens // self._page_size) - lease.num_pages
        if self._memory.fits({None: wanted}, self._book):
            if self._restore(lease):
                self._take_tail(lease, residual, context_tail_hash, context_len, reusable)
            if self.grow(lease, num_tokens):
                return lease
        self._book.remove(lease)
        self._unpin(lease)
        self._memory.make_room_for_a_retry(self._book)
        return None

    def grow(self, lease: SequenceLease, num_tokens: int) -> bool:
        """Make room for tokens up to ``num_tokens``; False, and no change, when there is none."""
        wanted = -(-num_tokens // self._page_size) - lease.num_pages
        if wanted <= 0:
            return True
        if num_tokens > len(lease.record.tokens):
            raise ValueError(f"{num_tokens} tokens in a sequence with room for {len(lease.record.tokens)}")
        pages = self._memory.allocate(None, wanted)
        if pages is None:
            return False
        lease.record.pages[lease.num_pages : lease.num_pages + wanted] = pages
        lease.num_pages += wanted
        return True

    def commit(self, lease: SequenceLease, num_computed: int) -> None:
        """KV of tokens[:num_computed] is written: file every block that is whole now. Drops the tail's source."""
        self._drop_tail(lease)
        lease.num_computed = num_computed
        while not lease.is_detached and (lease.num_blocks_in_tree + 1) * self._page_size <= num_computed:
            self._file_block(lease)

    def release(self, lease: SequenceLease, is_cold: bool = False) -> None:
        """Give back all that is not cached. The partly filled last page is cached as a tail for the next turn."""
        if lease.is_released:
            raise ValueError("lease released twice")
        lease.is_released = True
        self._book.remove(lease)
        if lease.tail is not None:  # released before its first step: the tail was never copied
            lease.num_computed -= lease.tail.num_tokens
        self._drop_tail(lease)
        kept = lease.num_blocks_in_tree
        if not lease.is_detached and lease.num_computed > kept * self._page_size:
            kept += self._file_tail(lease)
        private = lease.record.pages[kept : lease.num_pages]
        self._memory.free(None, [int(p) for p in private])
        deepest = lease.pinned
        self._unpin(lease)
        if is_cold and deepest is not None:
            self._tree.cool(deepest)

    # --- opening ----------------------------------------------------------------------------------------------------

    def _matched(
        self,
        key: PrefixKey,
        tokens: TokenArray,
        num_tokens: int,
        residual: ResidualKey | None,
        context_tail_hash: BlockHash | None,
        context_len: int,
        reusable: int,
    ) -> SequenceLease:
        size = self._page_size
        chain = self._chain(key, tokens, reusable // size)
        node = self._tree.match(chain, tokens[:num_tokens])
        num_blocks = node.depth + 1 if node is not None else 0
        record = PathRecord(tokens, np.zeros(-(-len(tokens) // size), dtype=np.int32), key.owner)
        if node is not None and node.record is not None:
            record.pages[:num_blocks] = node.record.pages[:num_blocks]
            self._tree.pin(node)
        lease = SequenceLease(key, record, chain, num_blocks, num_blocks, num_blocks * size, node)
        num_context = len(key.context)
        if residual is not None and num_context:
            entry = self._tree.match_residual(key.context, min(num_context, num_blocks), residual)
            if entry is not None:
                self._tree.pin(entry)
                lease.residual_pin = entry
                lease.residual_pages = entry.pages[: entry.node.depth + 1]
        self._take_tail(lease, residual, context_tail_hash, context_len, reusable)
        return lease

    def _take_tail(
        self,
        lease: SequenceLease,
        residual: ResidualKey | None,
        context_tail_hash: BlockHash | None,
        context_len: int,
        reusable: int,
    ) -> None:
        """Pin what the first private page starts with."""
        tokens = lease.record.tokens
        lease.tail = self._tail_source(lease, tokens, residual, context_tail_hash, context_len, reusable)
        if lease.tail is not None:
            self._tree.pin(lease.tail.node)
            if lease.tail.residual is not None:
                self._tree.pin(lease.tail.residual)
            lease.num_computed += lease.tail.num_tokens

    def _restore(self, lease: SequenceLease) -> bool:
        """Bring back from the host the whole blocks that continue the match, if that is cheaper; True drops the tail."""
        host, geometry = self._memory.host, self._memory.geometry
        if host is None or len(host) == 0:
            return False
        entries = host.run(lease.hashes[lease.num_blocks_in_tree :], None, lease.record.tokens)
        num_tokens = len(entries) * self._page_size - (lease.tail.num_tokens if lease.tail is not None else 0)
        if not host.estimate.pays(len(entries) * geometry.page_bytes(None), num_tokens):
            return False
        host.take(entries)
        pages = self._memory.allocate(None, len(entries))
        if pages is None:
            host.put_back(entries)
            return False
        if lease.tail is not None:
            lease.num_computed -= lease.tail.num_tokens
            self._drop_tail(lease)
        first = lease.num_pages
        lease.record.pages[first : first + len(pages)] = pages
        lease.num_pages += len(pages)
        for index, entry in enumerate(entries):
            self._file_block(lease)
            if lease.is_detached:
                host.give_up(entries[index:])
                break
            host.swap_in(entry, pages[index])
        lease.num_computed = lease.num_blocks_in_tree * self._page_size
        return True

    def _chain(self, key: PrefixKey, tokens: TokenArray, num_blocks: int) -> list[BlockHash]:
        """Hashes of the first ``num_blocks`` blocks: those of the key, and of what was generated since (a preempted turn)."""
        known = key.all_hashes[:num_blocks]
        if len(known) == num_blocks:
            return list(known)
        start = len(known) * self._page_size
        return [*known, *hash_blocks(key.own_parent, tokens[start : num_blocks * self._page_size], self._page_size)]

    def _tail_source(
        self,
        lease: SequenceLease,
        tokens: TokenArray,
        residual: ResidualKey | None,
        context_tail_hash: BlockHash | None,
        context_len: int,
        reusable: int,
    ) -> TailSource | None:
        start = lease.num_blocks_in_tree * self._page_size
        own = self._tree.match_tail(self._parent_hash(lease), tokens[start : reusable + 1], reusable - start)
        context = None
        if context_tail_hash is not None and context_len <= reusable and lease.num_blocks_in_tree == len(lease.key.context):
            context = self._tree.find(context_tail_hash, tokens[:context_len])
        if context is not None and (own is None or own[1] < context.length):
            entry = context.residuals.get(residual) if residual is not None else None
            return TailSource(context, context.length, is_context=True, residual=entry)
        if context is None and residual is None and lease.num_blocks_in_tree == len(lease.key.context):
            shared_end = min(context_len, reusable)
            # Without a residual to merge, the beginning of any canonical block will do, up to the fork point.
            shared = self._tree.match_tail(lease.key.context_parent, tokens[start:shared_end], shared_end - start)
            if shared is not None and (own is None or own[1] < shared[1]):
                return TailSource(shared[0], shared[1], is_context=True)
        return TailSource(own[0], own[1], is_context=False) if own is not None else None

    # --- filing -----------------------------------------------------------------------------------------------------

    def _parent_hash(self, lease: SequenceLease) -> BlockHash:
        """Hash under which the next block is filed."""
        index = lease.num_blocks_in_tree
        if index == len(lease.key.context):
            return lease.key.own_seed
        return lease.hashes[index - 1] if index else lease.key.context_seed

    def _fork_parent(self, lease: SequenceLease) -> BlockHash | None:
        """Block before the branch's chain, when the next block is the chain's first; None at the start of a sequence."""
        key = lease.key
        is_first_own = lease.num_blocks_in_tree == len(key.context)
        return key.context_parent if is_first_own and key.own_seed != key.context_parent else None

    def _block_hash(self, lease: SequenceLease, index: int) -> BlockHash:
        if index == len(lease.hashes):
            start = index * self._page_size
            block = lease.record.tokens[start : start + self._page_size]
            lease.hashes.append(hash_blocks(self._parent_hash(lease), block, self._page_size)[0])
        return lease.hashes[index]

    def _file_block(self, lease: SequenceLease) -> None:
        index = lease.num_blocks_in_tree
        block_hash = self._block_hash(lease, index)
        page = int(lease.record.pages[index])
        end = (index + 1) * self._page_size
        node = self._insert(lease, block_hash, page, end, self._page_size)
        if node is None:
            lease.is_detached = True
            return
        if node.page != page and node.page is not None:
            # Somebody else filed the same block first: theirs stays, ours goes back.
            lease.record.pages[index] = node.page
            self._memory.free(None, [page])
        self._repin(lease, node)
        lease.num_blocks_in_tree += 1

    def _file_tail(self, lease: SequenceLease) -> int:
        """File the partly filled last page; 1 if the tree took it, 0 if it has the same tail already."""
        index = lease.num_blocks_in_tree
        start = index * self._page_size
        block = lease.record.tokens[start : lease.num_computed]
        page = int(lease.record.pages[index])
        node = self._insert(lease, partial_hash(self._parent_hash(lease), block), page, lease.num_computed, len(block))
        if node is None or node.page == page:
            return int(node is not None)
        self._tree.touch(node)
        return 0

    def _insert(self, lease: SequenceLease, block_hash: BlockHash, page: int, end: int, length: int) -> Node | None:
        """The tree's node of that block, new or old; None when another block has the same hash (a collision)."""
        existing = self._tree.find(block_hash, lease.record.tokens[:end])
        if existing is not None:
            return existing
        if block_hash in self._tree:
            return None
        node = self._tree.insert(
            block_hash,
            self._parent_hash(lease),
            self._fork_parent(lease),
            page,
            end // self._page_size - (length == self._page_size),
            end,
            length,
            lease.record,
        )
        node.is_private_tail = length < self._page_size
        self._memory.base_filed(node)
        return node

    def _repin(self, lease: SequenceLease, node: Node) -> None:
        self._tree.pin(node)
        if lease.pinned is not None:
            self._tree.unpin(lease.pinned)
        lease.pinned = node

    # --- closing ----------------------------------------------------------------------------------------------------

    def _drop_tail(self, lease: SequenceLease) -> None:
        if lease.tail is None:
            return
        self._tree.unpin(lease.tail.node)
        if lease.tail.residual is not None:
            self._tree.unpin(lease.tail.residual)
        lease.tail = None

    def _unpin(self, lease: SequenceLease) -> None:
        self._drop_tail(lease)
        if lease.residual_pin is not None:
            self._tree.unpin(lease.residual_pin)
            lease.residual_pin = None
        if lease.pinned is not None:
            self._tree.unpin(lease.pinned)
            lease.pinned = None
