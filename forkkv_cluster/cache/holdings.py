"""Whose pages the device holds, and what sharing saves: counts that follow every page filed or evicted, O(1) each."""

from __future__ import annotations

from collections import Counter

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.tree_nodes import Node, Residual


class Holdings:
    """Bytes of filed pages by owner (the tenant who first needed them) and, of residual pages, by adapter digest.

    ``shared_savings``: each adapter with a residual over a block reads the one base page under it; caches of their own
    would hold a base page each. What those would need, less the base page and the residual pages that are held. With a
    single adapter that is negative: a residual is then held beside the base page that nobody shares.
    """

    def __init__(self, geometry: KVGeometry) -> None:
        self._geometry = geometry
        self.by_owner: Counter[str] = Counter()
        self.by_adapter: Counter[str] = Counter()
        self.shared_savings = 0

    def base_filed(self, node: Node) -> None:
        self._count(node, self._geometry.page_bytes(None))

    def base_evicted(self, node: Node) -> None:
        self._count(node, -self._geometry.page_bytes(None))

    def residual_filed(self, residual: Residual) -> None:
        """The residual is in its node already."""
        self._count_residual(residual, 1, is_only=len(residual.node.residuals) == 1)

    def residual_evicted(self, residual: Residual) -> None:
        """The residual is out of its node already."""
        self._count_residual(residual, -1, is_only=not residual.node.residuals)

    def _count_residual(self, residual: Residual, sign: int, *, is_only: bool) -> None:
        base_bytes = self._geometry.page_bytes(None)
        num_bytes = self._geometry.page_bytes(residual.key.rank_class)
        self._count(residual.node, sign * num_bytes)
        _add(self.by_adapter, residual.key.adapter, sign * num_bytes)
        self.shared_savings += sign * (base_bytes - num_bytes - (base_bytes if is_only else 0))

    def _count(self, node: Node, num_bytes: int) -> None:
        _add(self.by_owner, node.record.owner if node.record is not None else "", num_bytes)


def _add(counter: Counter[str], name: str, num_bytes: int) -> None:
    counter[name] += num_bytes
    if counter[name] == 0:
        del counter[name]
