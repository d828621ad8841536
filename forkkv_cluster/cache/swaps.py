"""Copies between device and host that are decided but not made yet, as values.

All swap-outs of a step are made before its swap-ins, and both before anything else of the step: a device page that was
evicted and handed out again within one ``schedule`` is read before it is overwritten. What makes that order enough:

* a host page that a swap-in will read is not handed out again before the swap-in is made (``take`` says when);
* an entry evicted from the device before its swap-in was made goes back to its host page: the swap-in is cancelled;
* a host page given up before its swap-out was made cancels the swap-out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.page_pool import PageClass
from forkkv_cluster.cache.tree_nodes import PageTable


@dataclass(frozen=True, slots=True, eq=False)
class PageSwap:
    """Whole pages of one class that move together: device_pages [n] and host_pages [n] int32, page by page."""

    page_class: PageClass
    device_pages: PageTable
    host_pages: PageTable

    def __len__(self) -> int:
        return len(self.device_pages)


@dataclass(frozen=True, slots=True, eq=False)
class SwapPlan:
    """Copies of one step, by page class: ``outs`` to the host first, then ``ins`` from it."""

    outs: tuple[PageSwap, ...] = ()
    ins: tuple[PageSwap, ...] = ()

    def num_bytes(self, geometry: KVGeometry) -> int:
        """Bytes to copy in both directions."""
        return sum(len(swap) * geometry.page_bytes(swap.page_class) for swap in (*self.outs, *self.ins))


NO_SWAPS = SwapPlan()


def group_by_class(pairs: Iterable[tuple[PageClass, int, int]]) -> tuple[PageSwap, ...]:
    """(class, device page, host page) triples, ordered by device page so that runs of pages stay runs."""
    groups: dict[PageClass, list[tuple[int, int]]] = {}
    for page_class, device_page, host_page in pairs:
        groups.setdefault(page_class, []).append((device_page, host_page))
    swaps = []
    for page_class, pages in groups.items():
        table = np.array(sorted(pages), dtype=np.int32)
        swaps.append(PageSwap(page_class, table[:, 0], table[:, 1]))
    return tuple(swaps)
