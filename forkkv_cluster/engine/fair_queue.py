"""Requests that wait, in the order in which they may start.

Priorities are strict. Within one, the tenant goes first that has had the fewest tokens (a virtual token counter: every
token that runs for a tenant, prompt or generated, counts one); within a tenant, whoever came first. A tenant that comes
back from a pause starts level with the least served active one, so that a pause earns nothing.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Iterator

from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.engine.sequence import BACKGROUND, Runnable, Waiting


class FairQueue:
    """Counters are kept per tenant for good: there are as many as the configuration names."""

    def __init__(self) -> None:
        self._entries: dict[RequestId, Waiting] = {}
        self._levels: dict[int, dict[str, list[Waiting]]] = {}  # priority -> tenant -> by arrival
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Waiting]:
        """Everybody, in no order that means anything."""
        return iter(self._entries.values())

    def add(self, entry: Waiting, running: Iterable[Runnable]) -> None:
        """``running``: whose tenants are active besides those that wait."""
        tenant = entry.tenant
        active = {t for level in self._levels.values() for t in level}
        if tenant not in active:
            active |= {item.tenant for item in running}
            least = min((self._served.get(t, 0) for t in active), default=0)
            if tenant not in active:
                self._served[tenant] = max(self._served.get(tenant, 0), least)
        level = self._levels.setdefault(entry.order[0], {})
        bisect.insort(level.setdefault(tenant, []), entry, key=_order)
        self._entries[entry.request_id] = entry

    def remove(self, entry: Waiting) -> None:
        del self._entries[entry.request_id]
        level = self._levels[entry.order[0]]
        line = level[entry.tenant]
        del line[bisect.bisect_left(line, entry.order, key=_order)]
        if not line:
            del level[entry.tenant]
        if not level:
            del self._levels[entry.order[0]]

    def find(self, request_id: RequestId) -> Waiting | None:
        return self._entries.get(request_id)

    @property
    def num_clients(self) -> int:
        """Those that wait without the engine's own work."""
        return len(self._entries) - sum(len(line) for line in self._levels.get(BACKGROUND, {}).values())

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Tokens run for this tenant."""
        self._served[tenant] = self._served.get(tenant, 0) + num_tokens

    def served(self, tenant: str) -> int:
        """Tokens that have run for this tenant, or that it is taken to have had."""
        return self._served.get(tenant, 0)

    def has_better(self, priority: int) -> bool:
        """Whether anybody waits whose priority is strictly better."""
        return any(level < priority for level in self._levels)

    def candidates(self) -> Iterator[Waiting]:
        """Everybody, who may start first first. The entry just yielded may be removed, and tenants charged, meanwhile."""
        for priority in sorted(self._levels):
            lines = [_Line(self._served.get(t, 0), tuple(line)) for t, line in self._levels.get(priority, {}).items()]
            heapq.heapify(lines)
            while lines:
                line = lines[0]
                entry = line.entries[line.position]
                yield entry
                line.position += 1
                if line.position == len(line.entries):
                    heapq.heappop(lines)
                    continue
                line.served = self._served.get(entry.tenant, 0)
                heapq.heapreplace(lines, line)


class _Line:
    """One tenant's requests; of two tenants served alike, the one goes first whose first request came first."""

    __slots__ = ("entries", "position", "served")

    def __init__(self, served: int, entries: tuple[Waiting, ...]) -> None:
        self.served = served
        self.entries = entries
        self.position = 0

    def __lt__(self, other: _Line) -> bool:
        mine = (self.served, self.entries[self.position].order)
        return mine < (other.served, other.entries[other.position].order)


def _order(item: Waiting) -> tuple[int, int]:
    return item.order
