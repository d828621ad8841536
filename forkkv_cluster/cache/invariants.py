"""What must always hold of KV memory, checked from nothing but the structures themselves.

Run after every rule of the stateful tests, in soak runs and on demand; costs O(everything).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from forkkv_cluster.cache.dual_radix_tree import DualRadixTree
from forkkv_cluster.cache.host_tier import HostTier, Slot
from forkkv_cluster.cache.kv_memory import KVMemory
from forkkv_cluster.cache.lease_book import LeaseBook
from forkkv_cluster.cache.leases import ContextLease
from forkkv_cluster.cache.page_pool import PageClass
from forkkv_cluster.cache.tree_nodes import Node, Residual
from forkkv_cluster.core.errors import Internal


def check_invariants(memory: KVMemory, book: LeaseBook) -> None:
    """Raise Internal that lists every broken promise; return when there is none."""
    merged = [] if memory.merged.is_consistent() else ["merged keys do not lie in what they borrow"]
    problems = [*merged, *_tree_problems(memory.tree), *_page_problems(memory, book), *_pin_problems(memory.tree, book)]
    problems += _hint_problems(memory)
    if memory.host is not None:
        problems += _host_problems(memory.host, memory.tree)
    if problems:
        raise Internal("KV memory invariants are broken: " + "; ".join(problems[:10]))


def _tree_problems(tree: DualRadixTree) -> list[str]:
    problems = []
    for node in tree.nodes():
        name = f"block {node.hash.hex()[:8]} at depth {node.depth}"
        if node.page is None:
            problems.append(f"{name} has no page")
        if node.parent is None or node.parent.children.get(node.hash) is not node:
            problems.append(f"{name} is not a child of its parent")
        if tree.is_listed(node) != node.is_evictable:
            problems.append(f"{name} is {'not ' if node.is_evictable else ''}in the eviction order, wrongly")
        problems += [p for r in node.residuals.values() for p in _residual_problems(tree, node, r, name)]
    for seed in tree.seeds():
        if not seed.children and not seed.forks:
            problems.append(f"seed {seed.hash.hex()[:8]} has nothing below it")
        if seed.parent is not None and seed.parent.forks.get(seed.hash) is not seed:
            problems.append(f"seed {seed.hash.hex()[:8]} is not a fork of its parent")
    return problems


def _residual_problems(tree: DualRadixTree, node: Node, residual: Residual, name: str) -> list[str]:
    problems = []
    above = node.parent.residuals.get(residual.key) if node.parent is not None else None
    if node.depth > 0 and above is None:
        problems.append(f"residual of {residual.key.adapter} at {name} has none above it")
    below = sum(1 for child in node.children.values() if residual.key in child.residuals)
    if below != residual.num_children:
        problems.append(f"residual of {residual.key.adapter} at {name} counts {residual.num_children} below, not {below}")
    if tree.is_listed(residual) != residual.is_evictable:
        problems.append(f"residual of {residual.key.adapter} at {name} is wrongly in or out of the eviction order")
    return problems


def _page_problems(memory: KVMemory, book: LeaseBook) -> list[str]:
    """Every allocated page has exactly one owner: a node, a residual, or one lease that has not filed it."""
    owners: Counter[tuple[PageClass, int]] = Counter()
    for node in memory.tree.nodes():
        if node.page is not None:
            owners[None, node.page] += 1
        for residual in node.residuals.values():
            owners[residual.key.rank_class, residual.page] += 1
    for lease in book:
        owners.update((None, int(p)) for p in lease.record.pages[lease.num_blocks_in_tree : lease.num_pages])
        if isinstance(lease, ContextLease):
            for plan in lease.residuals:
                owners.update((plan.key.rank_class, int(p)) for p in plan.pages[plan.block : plan.num_pages])
    problems = [f"page {page} of class {c} has {n} owners" for (c, page), n in owners.items() if n > 1]
    for page_class in memory.pool.page_classes():
        owned = sum(1 for c, _ in owners if c == page_class)
        allocated = memory.pool.num_allocated(page_class)
        if owned != allocated:
            problems.append(f"{allocated} pages of class {page_class} are allocated but {owned} have an owner")
    return problems


def _pin_problems(tree: DualRadixTree, book: LeaseBook) -> list[str]:
    expected: Counter[Node | Residual] = Counter()
    for lease in book:
        if lease.pinned is not None:
            expected[lease.pinned] += 1
        if isinstance(lease, ContextLease):
            expected.update(plan.pinned for plan in lease.residuals if plan.pinned is not None)
            continue
        if lease.residual_pin is not None:
            expected[lease.residual_pin] += 1
        if lease.tail is not None:
            expected[lease.tail.node] += 1
            if lease.tail.residual is not None:
                expected[lease.tail.residual] += 1
    entries: list[Node | Residual] = []
    for node in tree.nodes():
        entries += [node, *node.residuals.values()]
    problems = [f"an entry has {e.pins} pins, leases hold {expected[e]}" for e in entries if e.pins != expected[e]]
    gone = set(expected) - set(entries)
    return problems + ([f"{len(gone)} pinned entries are not in the tree"] if gone else [])


def _hint_problems(memory: KVMemory) -> list[str]:
    """Hints cover at most their share of the pool, and exactly the entries that are marked."""
    problems = []
    if memory.hints.kept_bytes > memory.hints.max_bytes:
        problems.append(f"hints cover {memory.hints.kept_bytes} bytes of at most {memory.hints.max_bytes}")
    for slot, entry in _device_slots(memory.tree):
        if entry.is_kept != (slot in memory.hints):
            problems.append(f"{slot[0].hex()[:8]} ({slot[1]}) is {'' if entry.is_kept else 'not '}kept, wrongly")
    return problems


def _host_problems(host: HostTier, tree: DualRadixTree) -> list[str]:
    """Nothing is in both places; all that is here has its support; each page has one owner, counting those that leave."""
    on_device = dict(_device_slots(tree))
    problems, owners = [], Counter[tuple[PageClass, int]]()
    for entry in host.entries():
        name = f"host page of {entry.slot[0].hex()[:8]} ({entry.slot[1]})"
        owners[entry.page_class, entry.page] += 1
        if entry.slot in on_device:
            problems.append(f"{name} is on the device, too")
        if any(need not in on_device and need not in host for need in entry.needs):
            problems.append(f"{name} lacks what it depends on")
        if host.is_listed(entry) != (not any(host.dependents(entry.slot))):
            problems.append(f"{name} is wrongly in or out of the eviction order")
    for page_class, page, entry in host.swap_ins():
        owners[page_class, entry.page] += 1
        node = on_device.get(entry.slot)
        if node is None or node.page != page:
            problems.append(f"a swap-in is due to page {page} of class {page_class}, which does not hold its block")
    problems += [f"host page {page} of class {c} has {n} owners" for (c, page), n in owners.items() if n > 1]
    for page_class in host.pool.page_classes():
        owned = sum(1 for c, _ in owners if c == page_class)
        if owned != host.pool.num_allocated(page_class):
            problems.append(f"{host.pool.num_allocated(page_class)} host pages of class {page_class}, {owned} with an owner")
    return problems


def _device_slots(tree: DualRadixTree) -> Iterator[tuple[Slot, Node | Residual]]:
    for node in tree.nodes():
        yield (node.hash, None), node
        yield from (((node.hash, key), residual) for key, residual in node.residuals.items())
