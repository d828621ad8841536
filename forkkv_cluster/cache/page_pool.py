"""One byte budget for every kind of page: a slab allocator.

The arena is cut into slabs of equal size. A slab that holds pages belongs to one *page class*: base pages (class
``None``) or residual pages of one rank class (8, 16, ...). It goes back to the free slabs when its last page is freed,
so memory moves between base and residual KV as the load asks for it, without a fixed split. Free slabs can be borrowed in
rows (``cache.merged_keys``) for what is worth keeping only while nobody needs the memory.

Lowest addresses first, in slabs and within a slab: fresh allocations come out as runs of consecutive pages, which the
CPU attention reads as views, without a gather.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Protocol

PageClass = int | None
"""None: base pages; an int: residual pages of that rank class."""


class SlabSizes(Protocol):
    """The part of ``cache.geometry.KVGeometry`` that allocation needs."""

    def pages_per_slab(self, rank_class: int | None) -> int: ...


class PagePool:
    """Allocates page ids of any class out of ``num_slabs`` slabs. Page p of a class lives in slab p // pages_per_slab.

    Allocation and freeing cost O(log slabs). Not thread-safe.
    """

    def __init__(self, sizes: SlabSizes, num_slabs: int) -> None:
        self._sizes = sizes
        self.num_slabs = num_slabs
        self._free_slabs = list(range(num_slabs))  # ascending: already a heap
        self._slab_free: dict[int, list[int]] = {}  # used slab -> heap of its free page ids
        self._slab_class: dict[int, PageClass] = {}
        self._open: dict[PageClass, list[int]] = {}  # class -> heap of slabs with free pages (entries may be stale)
        self._allocated: dict[PageClass, int] = {}
        self._num_slabs_of: dict[PageClass, int] = {}
        self._num_borrowed = 0
        self._longest_row: int | None = None  # an upper bound, None until a search has failed

    @property
    def num_free_slabs(self) -> int:
        return len(self._free_slabs)

    @property
    def num_borrowed_slabs(self) -> int:
        return self._num_borrowed

    @property
    def num_used_slabs(self) -> int:
        """Slabs that hold pages."""
        return self.num_slabs - len(self._free_slabs) - self._num_borrowed

    def num_allocated(self, page_class: PageClass) -> int:
        """Pages of that class in use."""
        return self._allocated.get(page_class, 0)

    def num_slabs_of(self, page_class: PageClass) -> int:
        """Slabs that hold pages of that class."""
        return self._num_slabs_of.get(page_class, 0)

    def page_classes(self) -> tuple[PageClass, ...]:
        """Every class that has had a page."""
        return tuple(self._allocated)

    def num_allocatable(self, page_class: PageClass) -> int:
        """Pages of that class that ``allocate`` could hand out now, if nothing else were allocated."""
        per_slab = self._sizes.pages_per_slab(page_class)
        num_class_slabs = self.num_slabs_of(page_class)
        return len(self._free_slabs) * per_slab + num_class_slabs * per_slab - self.num_allocated(page_class)

    def has_room(self, demand: Mapping[PageClass, int]) -> bool:
        """Whether so many pages of each class could be allocated now, all of them together."""
        num_slabs = 0
        for page_class, num_pages in demand.items():
            per_slab = self._sizes.pages_per_slab(page_class)
            num_open = self.num_slabs_of(page_class) * per_slab - self.num_allocated(page_class)
            num_slabs += max(0, -(-(num_pages - num_open) // per_slab))
        return num_slabs <= len(self._free_slabs)

    def allocate(self, page_class: PageClass, num_pages: int) -> list[int] | None:
        """``num_pages`` page ids, or None and no change when they are not all there."""
        pages: list[int] = []
        for _ in range(num_pages):
            page = self._allocate_one(page_class)
            if page is None:
                self.free(page_class, pages)
                return None
            pages.append(page)
        return pages

    def free(self, page_class: PageClass, pages: list[int]) -> None:
        """Give pages back. Raises ValueError for a page that is not allocated in that class."""
        per_slab = self._sizes.pages_per_slab(page_class)
        for page in pages:
            slab = page // per_slab
            free = self._slab_free.get(slab)
            if free is None or self._slab_class[slab] != page_class or page in free:
                raise ValueError(f"page {page} of class {page_class} is not allocated")
            self._allocated[page_class] -= 1
            if len(free) + 1 == per_slab:
                del self._slab_free[slab], self._slab_class[slab]
                heapq.heappush(self._free_slabs, slab)
                self._longest_row = None
                self._num_slabs_of[page_class] -= 1
                continue
            if not free:
                heapq.heappush(self._open.setdefault(page_class, []), slab)
            heapq.heappush(free, page)

    def borrow(self, num_slabs: int) -> int | None:
        """The first of ``num_slabs`` free slabs in a row, taken out of the pool; None when there is no such row.

        The highest ones: pages are handed out from the lowest on. O(slabs).
        """
        if self._longest_row is not None and num_slabs > self._longest_row:
            return None  # a search of all free slabs for each turn of each step would be felt
        free = sorted(self._free_slabs)
        for last in range(len(free) - 1, num_slabs - 2, -1):
            first = last - num_slabs + 1
            if free[last] - free[first] == num_slabs - 1:
                self._free_slabs = free[:first] + free[last + 1 :]
                self._num_borrowed += num_slabs
                return free[first]
        self._longest_row = num_slabs - 1
        return None

    def give_back(self, first_slab: int, num_slabs: int) -> None:
        """Undo one ``borrow``."""
        for slab in range(first_slab, first_slab + num_slabs):
            heapq.heappush(self._free_slabs, slab)
        self._num_borrowed -= num_slabs
        self._longest_row = None

    def _allocate_one(self, page_class: PageClass) -> int | None:
        slab = self._open_slab(page_class)
        if slab is None:
            return None
        free = self._slab_free[slab]
        page = heapq.heappop(free)
        if not free:
            heapq.heappop(self._open[page_class])
        self._allocated[page_class] = self._allocated.get(page_class, 0) + 1
        return page

    def _open_slab(self, page_class: PageClass) -> int | None:
        """Lowest slab of that class with a free page; a fresh slab when there is none."""
        heap = self._open.setdefault(page_class, [])
        while heap:
            slab = heap[0]
            if self._slab_class.get(slab, _NO_CLASS) == page_class and self._slab_free[slab]:
                return slab
            heapq.heappop(heap)  # stale: the slab was freed, or belongs to another class now
        if not self._free_slabs:
            return None
        slab = heapq.heappop(self._free_slabs)
        per_slab = self._sizes.pages_per_slab(page_class)
        self._slab_class[slab] = page_class
        self._num_slabs_of[page_class] = self._num_slabs_of.get(page_class, 0) + 1
        self._slab_free[slab] = list(range(slab * per_slab, (slab + 1) * per_slab))
        heapq.heappush(heap, slab)
        return slab


_NO_CLASS = -1  # No page class has this number; tells "free slab" from "base slab" (None) in a lookup.
