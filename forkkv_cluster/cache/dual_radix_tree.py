"""DualRadixTree: one page-granular trie over block hashes; base pages in its nodes, residual pages per adapter in them.

(ForkKV, arXiv 2604.06370, names the two trees bCache and rCache; here they are one trie, which makes inclusion
structural: a residual cannot outlive its base page.)

Costs, with n blocks in a sequence: a match is O(log n) dictionary probes, one comparison of tokens and one slice of
pages; pin, unpin and evicting one entry are O(1), whatever the depth and the number of leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from forkkv_cluster.cache.eviction import LruList
from forkkv_cluster.cache.tree_nodes import Node, PageTable, PathRecord, Residual, ResidualKey
from forkkv_cluster.core.ids import BlockHash
from forkkv_cluster.core.prefix import TokenArray

MAX_TAIL_CANDIDATES = 16
"""Children looked at when a match ends inside a block. Canonical contexts have few; more would make a match O(children)."""


class DualRadixTree:
    """Bookkeeping only: pages are numbers that the owner allocated; ``on_evict`` gives them back.

    Not thread-safe: one engine thread owns it.
    """

    def __init__(self, on_evict_base: Callable[[Node], None], on_evict_residual: Callable[[Residual], None]) -> None:
        self._nodes: dict[BlockHash, Node] = {}  # whole blocks and tails, by chained hash
        self._seeds: dict[BlockHash, Node] = {}  # roots and fork points: no page
        self._lru: LruList[Node | Residual] = LruList()
        self._kept: LruList[Node | Residual] = LruList()  # evicted when nothing else is left
        self._on_evict_base = on_evict_base
        self._on_evict_residual = on_evict_residual
        self._clock = 0

    def __len__(self) -> int:
        """Nodes that hold a page."""
        return len(self._nodes)

    @property
    def num_evictable(self) -> int:
        """Entries that could be evicted right now (evicting them makes their parents evictable)."""
        return len(self._lru) + len(self._kept)

    def nodes(self) -> Iterator[Node]:
        """All nodes that hold a page, in no particular order."""
        return iter(self._nodes.values())

    def seeds(self) -> Iterator[Node]:
        return iter(self._seeds.values())

    def is_listed(self, entry: Node | Residual) -> bool:
        """Whether the entry stands in the eviction order."""
        return entry in self._order(entry)

    def _order(self, entry: Node | Residual) -> LruList[Node | Residual]:
        return self._kept if entry.is_kept else self._lru

    # --- matching -----------------------------------------------------------------------------------------------

    def match(self, chain: Sequence[BlockHash], tokens: TokenArray) -> Node | None:
        """Deepest node of ``chain`` that is here and whose whole path holds exactly ``tokens`` [n] int32."""
        low, high = 0, len(chain)  # base validity is prefix-closed: eviction is leaf first
        while low < high:
            middle = (low + high) // 2
            if chain[middle] in self._nodes:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return None
        node = self._nodes[chain[low - 1]]
        return node if self._holds(node, tokens) else None

    def __contains__(self, block_hash: object) -> bool:
        """Whether a block of this hash is here, whatever its tokens."""
        return block_hash in self._nodes

    def node(self, block_hash: BlockHash) -> Node:
        """The node of a block that a pin protects. Raises KeyError when it is not here."""
        return self._nodes[block_hash]

    def find(self, block_hash: BlockHash, tokens: TokenArray) -> Node | None:
        """The node of exactly this hash, if its whole path holds ``tokens[:node.end]``."""
        node = self._nodes.get(block_hash)
        return node if node is not None and self._holds(node, tokens) else None

    def match_residual(self, chain: Sequence[BlockHash], num_base: int, key: ResidualKey) -> Residual | None:
        """Deepest residual of ``key`` on the first ``num_base`` blocks of ``chain``, which the base match has verified."""
        low, high = 0, num_base
        while low < high:
            middle = (low + high) // 2
            if key in self._nodes[chain[middle]].residuals:
                low = middle + 1
            else:
                high = middle
        return self._nodes[chain[low - 1]].residuals[key] if low else None

    def match_tail(self, parent: BlockHash, tokens: TokenArray, limit: int) -> tuple[Node, int] | None:
        """Child of ``parent`` that shares the longest prefix with ``tokens`` [n] int32, and its length (1 to ``limit``).

        The pages of that prefix can be copied: KV of a token depends on the tokens before it alone.
        """
        node = self._nodes.get(parent) or self._seeds.get(parent)
        if node is None or limit <= 0:
            return None
        best: tuple[Node, int] | None = None
        for child in islice(reversed(node.children.values()), MAX_TAIL_CANDIDATES):
            length = min(child.length, limit, len(tokens))
            differs = child.block_tokens()[:length] != tokens[:length]
            common = int(np.argmax(differs)) if differs.any() else length
            if common > (best[1] if best else 0):
                best = (child, common)
        return best

    @staticmethod
    def _holds(node: Node, tokens: TokenArray) -> bool:
        record = node.record
        return record is not None and node.end <= len(tokens) and np.array_equal(record.tokens[: node.end], tokens[: node.end])

    # --- growing ------------------------------------------------------------------------------------------------

    def insert(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash,
        fork_parent: BlockHash | None,
        page: int,
        depth: int,
        end: int,
        length: int,
        record: PathRecord,
    ) -> Node:
        """File one block under ``parent_hash``, unless it is there: then the node that is there is returned.

        ``fork_parent``: where the chain begins, the hash of the block before it (None at the start of a sequence).
        An unknown ``parent_hash`` is the seed of a new chain, which begins after ``fork_parent``.
        """
        existing = self._nodes.get(block_hash)
        if existing is not None:
            return existing
        parent = self._nodes.get(parent_hash) or self._seeds.get(parent_hash)
        if parent is None:
            parent = self._new_seed(parent_hash, fork_parent)
        node = Node(block_hash, parent, page, depth, end, length, record)
        parent.children[block_hash] = node
        self._order(parent).discard(parent)
        self._nodes[block_hash] = node
        self.touch(node)
        return node

    def add_residual(self, node: Node, key: ResidualKey, page: int, pages: PageTable) -> Residual:
        """Attach a residual page, unless the node has one of that key: then that one is returned.

        Raises ValueError when the parent block lacks it: residuals are prefix-closed.
        """
        existing = node.residuals.get(key)
        if existing is not None:
            return existing
        above = node.parent.residuals.get(key) if node.parent is not None else None
        if above is None and node.depth > 0:
            raise ValueError(f"residual of {key.adapter} at block {node.depth} without one at block {node.depth - 1}")
        residual = Residual(key, node, page, pages)
        node.residuals[key] = residual
        if above is not None:
            above.num_children += 1
            self._order(above).discard(above)
        self._order(residual).add_newest(residual)
        return residual

    def _new_seed(self, seed: BlockHash, fork_parent: BlockHash | None) -> Node:
        above = None
        if fork_parent is not None:
            above = self._nodes.get(fork_parent) or self._seeds.get(fork_parent)
            if above is None:
                above = self._new_seed(fork_parent, None)
        node = Node(
            seed, above, None, above.depth if above else -1, above.end if above else 0, 0, above.record if above else None
        )
        if above is not None:
            above.forks[seed] = node
            self._order(above).discard(above)
        self._seeds[seed] = node
        return node

    # --- protection ---------------------------------------------------------------------------------------------

    def pin(self, entry: Node | Residual) -> None:
        """Protect the entry and, through it, everything above it."""
        entry.pins += 1
        self._order(entry).discard(entry)

    def unpin(self, entry: Node | Residual) -> None:
        """Undo one pin; the entry becomes the most recently used."""
        if entry.pins <= 0:
            raise ValueError("unpin without pin")
        entry.pins -= 1
        self.touch(entry if isinstance(entry, Node) else entry.node)
        if isinstance(entry, Residual) and entry.is_evictable:
            self._order(entry).add_newest(entry)

    def touch(self, node: Node) -> None:
        """The node is the most recently used."""
        self._clock += 1
        node.last_used = self._clock
        if node.is_evictable:
            self._order(node).add_newest(node)

    def set_kept(self, entry: Node | Residual, is_kept: bool) -> None:
        """Whether the entry is evicted after all others; within both groups the least recently used goes first.

        One that is kept no longer goes next: whoever asked for it has left.
        """
        if entry.is_kept == is_kept:
            return
        was_listed = self.is_listed(entry)
        self._order(entry).discard(entry)
        entry.is_kept = is_kept
        if was_listed and is_kept:
            self._order(entry).add_newest(entry)
        elif was_listed:
            self._order(entry).add_oldest(entry)

    def cool(self, node: Node) -> None:
        """The path to ``node``, with all that branches off it, is evicted next, as far as nobody needs it."""
        above: Node | None = node
        while above is not None:
            for cold in (above, *above.children.values()):
                cold.last_used = 0  # an evicted leaf's parent goes next, unless it was used later
                entries: list[Node | Residual] = [cold, *cold.residuals.values()]
                for entry in entries:
                    if self.is_listed(entry):
                        self._order(entry).add_oldest(entry)
            above = above.parent

    # --- eviction -----------------------------------------------------------------------------------------------

    def evict_oldest(self) -> bool:
        """Evict the least recently used leaf: a residual page, or a base page with its residuals. False: nothing left."""
        entry = self._lru.oldest() or self._kept.oldest()
        if entry is None:
            return False
        if isinstance(entry, Residual):
            self.evict_residual(entry)
        else:
            self.evict_base(entry)
        return True

    def evict_residual(self, residual: Residual) -> None:
        """Evict one residual page that no block below depends on. Raises ValueError when pinned or not a leaf."""
        if not residual.is_evictable:
            raise ValueError("residual is pinned or has residuals below it")
        self._drop_residual(residual)

    def evict_base(self, node: Node) -> None:
        """Evict one leaf with all its residuals. Raises ValueError when it is pinned or has children."""
        if not node.is_evictable:
            raise ValueError("node is pinned, has children, or holds no page")
        for residual in list(node.residuals.values()):
            self._drop_residual(residual)
        self._order(node).discard(node)
        del self._nodes[node.hash]
        self._on_evict_base(node)
        self._detach(node)

    def _drop_residual(self, residual: Residual) -> None:
        node = residual.node
        del node.residuals[residual.key]
        self._order(residual).discard(residual)
        above = node.parent.residuals.get(residual.key) if node.parent is not None else None
        if above is not None:
            above.num_children -= 1
            if above.is_evictable:
                self._order(above).add_oldest(above)  # the rest of the run goes next: half a context's residual serves nobody
        self._on_evict_residual(residual)

    def _detach(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            return
        (parent.children if node.page is not None else parent.forks).pop(node.hash)
        is_newer = parent.last_used > node.last_used
        parent.last_used = max(parent.last_used, node.last_used)
        if parent.page is None:
            if not parent.children and not parent.forks:
                del self._seeds[parent.hash]
                self._detach(parent)
        elif parent.is_evictable:
            if is_newer:
                self._order(parent).add_newest(parent)  # used by somebody else since
            else:
                self._order(parent).add_oldest(parent)  # last used with its child: it goes next
