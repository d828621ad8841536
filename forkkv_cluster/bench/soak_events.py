"""What a directory would believe of the engine after all its events, against what is there."""

from __future__ import annotations

from collections.abc import Iterable

from forkkv_cluster.bench.soak_ledger import SoakFailure
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


class EventMirror:
    """Follows the events of one engine."""

    def __init__(self) -> None:
        self._facts: set[tuple[object, ...]] = set()

    def take(self, events: Iterable[CacheEvent]) -> None:
        for event in events:
            self._apply(event)

    def check(self, snapshot: Iterable[CacheEvent]) -> None:
        """Raises SoakFailure when the events tell another story than the snapshot."""
        there = EventMirror()
        there.take(snapshot)
        unknown, gone = len(there._facts - self._facts), len(self._facts - there._facts)
        if unknown or gone:
            raise SoakFailure("events", f"{unknown} facts were never told, {gone} told ones are not so")

    def _apply(self, event: CacheEvent) -> None:
        match event:
            case BaseStored(hashes):
                self._facts.update(("base", h) for h in hashes)
            case ResidualStored(adapter, semantics, hashes):
                self._facts.update(("residual", h, adapter, semantics) for h in hashes)
            case ResidualEvicted(adapter, semantics, hashes):
                self._facts.difference_update(("residual", h, adapter, semantics) for h in hashes)
            case BaseEvicted(hashes):
                lost = set(hashes)  # and every residual over them
                self._facts = {fact for fact in self._facts if fact[0] == "adapter" or fact[1] not in lost}
            case AdapterLoaded(adapter):
                self._facts.add(("adapter", adapter))
            case AdapterUnloaded(adapter):
                self._facts.discard(("adapter", adapter))
            case Cleared():
                self._facts = {fact for fact in self._facts if fact[0] == "adapter"}
