"""Collects what a step changed, one block at a time, into few events."""

from __future__ import annotations

from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.events import BaseEvicted, BaseStored, CacheEvent, ResidualEvicted, ResidualStored
from forkkv_cluster.core.ids import AdapterDigest, BlockHash

_Kind = type[BaseStored] | type[BaseEvicted] | type[ResidualStored] | type[ResidualEvicted]


class EventLog:
    """Consecutive blocks of one kind (and one adapter) become one event; order is kept."""

    def __init__(self) -> None:
        self._runs: list[tuple[_Kind, ResidualKey | None, list[BlockHash]]] = []

    def base_stored(self, block: BlockHash) -> None:
        self._add(BaseStored, None, block)

    def base_evicted(self, block: BlockHash) -> None:
        self._add(BaseEvicted, None, block)

    def residual_stored(self, key: ResidualKey, block: BlockHash) -> None:
        self._add(ResidualStored, key, block)

    def residual_evicted(self, key: ResidualKey, block: BlockHash) -> None:
        self._add(ResidualEvicted, key, block)

    def take(self) -> tuple[CacheEvent, ...]:
        """Events since the last call."""
        runs, self._runs = self._runs, []
        return tuple(_event(kind, key, blocks) for kind, key, blocks in runs)

    def _add(self, kind: _Kind, key: ResidualKey | None, block: BlockHash) -> None:
        if self._runs and self._runs[-1][:2] == (kind, key):
            self._runs[-1][2].append(block)
        else:
            self._runs.append((kind, key, [block]))


def _event(kind: _Kind, key: ResidualKey | None, blocks: list[BlockHash]) -> CacheEvent:
    if kind is BaseStored:
        return BaseStored(tuple(blocks))
    if kind is BaseEvicted:
        return BaseEvicted(tuple(blocks))
    if key is None:
        raise ValueError("a residual event needs its key")
    made = ResidualStored if kind is ResidualStored else ResidualEvicted
    return made(AdapterDigest(key.adapter), key.semantics, tuple(blocks))
