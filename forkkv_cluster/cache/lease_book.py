"""Every open lease of one engine, and the pages that they protect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.leases import ContextLease, SequenceLease
from forkkv_cluster.cache.page_pool import PageClass
from forkkv_cluster.cache.tree_nodes import PageTable

Lease = SequenceLease | ContextLease


class LeaseBook:
    """A set of leases. ``pinned_pages`` costs O(pages of all leases): ask when memory is short, not every step."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases)

    def add(self, lease: Lease) -> None:
        self._leases.add(lease)

    def remove(self, lease: Lease) -> None:
        self._leases.remove(lease)

    def pinned_pages(self) -> dict[PageClass, int]:
        """Pages that some lease protects, each counted once, by class."""
        tables: dict[PageClass, list[PageTable]] = {}
        for lease in self._leases:
            for page_class, table in _tables(lease):
                tables.setdefault(page_class, []).append(table)
        return {c: len(np.unique(np.concatenate(t))) for c, t in tables.items()}

    def unfiled_bytes(self, geometry: KVGeometry) -> Counter[str]:
        """Bytes of claimed pages that are in no tree, by owner."""
        found: Counter[str] = Counter()
        for lease in self._leases:
            pages = lease.num_pages - lease.num_blocks_in_tree
            found[lease.record.owner] += pages * geometry.page_bytes(None)
            for plan in lease.residuals if isinstance(lease, ContextLease) else ():
                found[lease.record.owner] += (plan.num_pages - plan.block) * geometry.page_bytes(plan.key.rank_class)
        return found


def _tables(lease: Lease) -> Iterator[tuple[PageClass, PageTable]]:
    yield None, lease.pages
    if isinstance(lease, ContextLease):
        for plan in lease.residuals:
            yield plan.key.rank_class, plan.pages[: plan.num_pages]
        return
    if lease.residual_pin is not None:
        yield lease.residual_pin.key.rank_class, lease.residual_pages
    if lease.tail is not None and lease.tail.node.page is not None:
        yield None, np.array([lease.tail.node.page], dtype=np.int32)
        if lease.tail.residual is not None:
            yield lease.tail.residual.key.rank_class, np.array([lease.tail.residual.page], dtype=np.int32)
