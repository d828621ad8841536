"""What sessions asked to keep, and for how long. Pure; time comes from the caller, in seconds of any one clock.

A hint covers pages by what they hold, not by where they are: a block that is evicted after all and comes back is kept
again. Hints never protect a page from an allocation that has nothing else to evict, and together they cover at most
``max_bytes``: of a longer context the first blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from forkkv_cluster.cache.host_tier import Slot


@dataclass(frozen=True, slots=True)
class _Hint:
    expires_s: float
    slots: frozenset[Slot]


class KeepHints:
    """Hints by name (a session's id); a second hint of the same name replaces the first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.kept_bytes = 0
        self._hints: dict[str, _Hint] = {}
        self._expiries: list[tuple[float, str]] = []  # heap; entries may be stale
        self._claims: dict[Slot, tuple[int, int]] = {}  # slot -> (hints that cover it, its bytes)

    def __contains__(self, slot: object) -> bool:
        """Whether some hint covers that page."""
        return slot in self._claims

    def __len__(self) -> int:
        """Hints in force."""
        return len(self._hints)

    def put(self, name: str, pages: Iterable[tuple[Slot, int]], expires_s: float) -> tuple[set[Slot], set[Slot]]:
        """Keep ``pages`` ((slot, bytes), the most wanted first) until ``expires_s``: slots newly covered, and no longer."""
        released = self.release(name)
        slots, added = [], set()
        for slot, num_bytes in pages:
            count, _ = self._claims.get(slot, (0, 0))
            if count == 0:
                if self.kept_bytes + num_bytes > self.max_bytes:
                    break
                self.kept_bytes += num_bytes
                added.add(slot)
            self._claims[slot] = (count + 1, num_bytes)
            slots.append(slot)
        if slots:
            self._hints[name] = _Hint(expires_s, frozenset(slots))
            heapq.heappush(self._expiries, (expires_s, name))
        return added - released, released - added

    def release(self, name: str) -> set[Slot]:
        """End a hint, if there is one: slots that no hint covers any more."""
        hint = self._hints.pop(name, None)
        released = set()
        for slot in hint.slots if hint is not None else ():
            count, num_bytes = self._claims[slot]
            if count > 1:
                self._claims[slot] = (count - 1, num_bytes)
                continue
            del self._claims[slot]
            self.kept_bytes -= num_bytes
            released.add(slot)
        return released

    def expire(self, now_s: float) -> set[Slot]:
        """End what has expired by ``now_s``: slots that no hint covers any more. O(1) when nothing has."""
        released: set[Slot] = set()
        while self._expiries and self._expiries[0][0] <= now_s:
            expires_s, name = heapq.heappop(self._expiries)
            hint = self._hints.get(name)
            if hint is not None and hint.expires_s == expires_s:
                released |= self.release(name)
        return released

    def bytes_by_name(self) -> dict[str, int]:
        """Bytes that each hint covers; pages under several hints count for each."""
        return {name: sum(self._claims[slot][1] for slot in hint.slots) for name, hint in self._hints.items()}
