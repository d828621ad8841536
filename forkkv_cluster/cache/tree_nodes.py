"""What the DualRadixTree is made of: page-granular nodes that carry a base page and, per adapter, a residual page."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from forkkv_cluster.core.ids import BlockHash
from forkkv_cluster.core.prefix import TokenArray

PageTable = npt.NDArray[np.int32]


class ResidualKey(NamedTuple):
    """Whose residual: adapter content digest, semantics (``eager`` or ``residual``) and the rank class of its pages.

    The two semantics never serve each other: they differ in the hidden states that were projected.
    """

    adapter: str
    semantics: str
    rank_class: int


class PathRecord:
    """Tokens and pages of one whole path from the root, shared by all nodes that one sequence inserted.

    tokens [>= end of node] int32 and pages [> depth of node] int32 are append-only buffers: a node of depth d owns the
    first d + 1 pages and the tokens before its ``end`` for as long as it lives, because its ancestors outlive it. So
    a match is one comparison of tokens and one slice of pages, however deep the path is.
    """

    __slots__ = ("owner", "pages", "tokens")

    def __init__(self, tokens: TokenArray, pages: PageTable, owner: str = "") -> None:
        """``owner``: the tenant that the path's pages are accounted to, the first who needed them."""
        self.tokens = tokens
        self.pages = pages
        self.owner = owner


class Node:
    """One block. ``page`` None marks a seed node: the root of a chain, or the point where a branch's chain begins.

    depth    index of the block in its sequence (-1 for a root)
    end      tokens from the start of the sequence to the end of this block
    length   tokens of this block; fewer than a page in a partly filled tail, which never has children
    forks    seed nodes of the branches that begin after this block, by seed; kept apart so that a match that ends
             inside a block looks at blocks alone
    pins     leases that protect this node; its ancestors are protected by having children
    is_kept  a session asked for it: evicted after all that nobody asked for
    is_private_tail  a branch's own partly filled tail: found by comparing tokens, not by hash
    """

    __slots__ = (
        "children",
        "depth",
        "end",
        "forks",
        "hash",
        "is_kept",
        "is_private_tail",
        "last_used",
        "length",
        "page",
        "parent",
        "pins",
        "record",
        "residuals",
    )

    def __init__(
        self,
        hash_: BlockHash,
        parent: Node | None,
        page: int | None,
        depth: int,
        end: int,
        length: int,
        record: PathRecord | None,
    ) -> None:
        self.hash = hash_
        self.parent = parent
        self.page = page
        self.depth = depth
        self.end = end
        self.length = length
        self.record = record
        self.children: dict[BlockHash, Node] = {}
        self.forks: dict[BlockHash, Node] = {}
        self.residuals: dict[ResidualKey, Residual] = {}
        self.pins = 0
        self.last_used = 0
        self.is_kept = False
        self.is_private_tail = False

    @property
    def is_evictable(self) -> bool:
        return self.page is not None and self.pins == 0 and not self.children and not self.forks

    def block_tokens(self) -> TokenArray:
        """This block's own tokens, [length] int32, a view."""
        if self.record is None:
            return np.zeros(0, dtype=np.int32)
        return self.record.tokens[self.end - self.length : self.end]


class Residual:
    """One adapter's residual page over one block. Lives inside its node, so it can never outlive the base page.

    pages          page table of this adapter over the path, in the pool of its rank class (append-only, see PathRecord)
    num_children   child nodes that hold a residual of the same key: evicted leaf first, so a match can binary-search
    """

    __slots__ = ("is_kept", "key", "node", "num_children", "page", "pages", "pins")

    def __init__(self, key: ResidualKey, node: Node, page: int, pages: PageTable) -> None:
        self.key = key
        self.node = node
        self.page = page
        self.pages = pages
        self.num_children = 0
        self.pins = 0
        self.is_kept = False

    @property
    def is_evictable(self) -> bool:
        return self.pins == 0 and self.num_children == 0
