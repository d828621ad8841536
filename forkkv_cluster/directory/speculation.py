"""What was just routed and will soon be there: short-lived entries beside the mirror of what is known to be there.

Without them a burst over one new context would scatter, because the first events arrive only after the first pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId
from forkkv_cluster.directory.worker_blocks import longest_prefix

_Place = tuple[WorkerId, AdapterDigest | None, str]
"""(worker, adapter, semantics); adapter None and semantics '' for base blocks."""


@dataclass(frozen=True, slots=True)
class _Entry:
    worker_id: WorkerId
    chains: tuple[tuple[_Place, tuple[BlockHash, ...]], ...]


class Speculation:
    """Entries live while their request runs and ``ttl_s`` after it ended; at most ``max_entries``, oldest out first."""

    def __init__(self, clock: Clock, ttl_s: float, max_entries: int = 4096) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._running: dict[str, _Entry] = {}
        self._ended: dict[str, tuple[float, _Entry]] = {}  # In order of expiry.
        self._expiry: dict[_Place, dict[BlockHash, float]] = {}

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    def start(
        self,
        request_id: str,
        worker_id: WorkerId,
        chain: tuple[BlockHash, ...],
        residuals: Iterable[tuple[AdapterDigest, str, tuple[BlockHash, ...]]] = (),
    ) -> None:
        """``request_id`` went to ``worker_id``: ``chain`` gets base KV there, each (adapter, semantics, chain) a residual.

        What was said of this request before is void: it may have been meant for a worker that did not take it.
        """
        self._purge()
        self.end(request_id)
        if request_id in self._ended:
            self._forget(*self._ended.pop(request_id))
        chains: list[tuple[_Place, tuple[BlockHash, ...]]] = [((worker_id, None, ""), chain)]
        chains += [((worker_id, adapter, semantics), blocks) for adapter, semantics, blocks in residuals]
        self._running[request_id] = entry = _Entry(worker_id, tuple(chains))
        self._set_expiry(entry, math.inf)
        while len(self._running) > self._max_entries:
            self.end(next(iter(self._running)))

    def end(self, request_id: str) -> None:
        """The request ended, well or not: its entry counts for ``ttl_s`` more. Unknown ids are none of ours."""
        entry = self._running.pop(request_id, None)
        if entry is None:
            return
        expiry = self._clock.monotonic() + self._ttl_s
        self._set_expiry(entry, expiry)
        self._ended[request_id] = (expiry, entry)
        self._purge()

    def drop_worker(self, worker_id: WorkerId) -> None:
        """The worker died: nothing will be there."""
        self._running = {rid: entry for rid, entry in self._running.items() if entry.worker_id != worker_id}
        self._ended = {rid: item for rid, item in self._ended.items() if item[1].worker_id != worker_id}
        self._expiry = {place: blocks for place, blocks in self._expiry.items() if place[0] != worker_id}

    def base_len(self, worker_id: WorkerId, chain: Sequence[BlockHash]) -> int:
        """Leading blocks of ``chain`` that will have base KV there."""
        return self._len((worker_id, None, ""), chain)

    def residual_len(self, worker_id: WorkerId, chain: Sequence[BlockHash], adapter: AdapterDigest, semantics: str) -> int:
        """Leading blocks of ``chain`` that will have this residual there."""
        return self._len((worker_id, adapter, semantics), chain)

    def _len(self, place: _Place, chain: Sequence[BlockHash]) -> int:
        expiry = self._expiry.get(place)
        if expiry is None:
            return 0
        now = self._clock.monotonic()
        return longest_prefix(chain, lambda block: expiry.get(block, 0.0) > now)

    def _set_expiry(self, entry: _Entry, expiry: float) -> None:
        for place, chain in entry.chains:
            self._expiry.setdefault(place, {}).update(dict.fromkeys(chain, expiry))

    def _purge(self) -> None:
        now = self._clock.monotonic()
        while self._ended:
            request_id, (expiry, entry) = next(iter(self._ended.items()))
            if expiry > now and len(self._ended) <= self._max_entries:
                return
            del self._ended[request_id]
            self._forget(expiry, entry)

    def _forget(self, expiry: float, entry: _Entry) -> None:
        for place, chain in entry.chains:
            blocks = self._expiry.get(place, {})
            for block in chain:
                # A later entry over the same block has set a later expiry.
                if blocks.get(block, math.inf) <= expiry:
                    del blocks[block]
            if not blocks:
                self._expiry.pop(place, None)
