"""KV memory as a device has it: what every element of the arena holds, so that a page served wrongly reads wrong.

The arena's layout (``cache.geometry``) is honoured: pages of different classes are views of the same elements, so two
pages that overlap destroy each other here as they would on a device.
"""

from __future__ import annotations

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.page_pool import PageClass, PagePool

Content = tuple[object, ...]
"""How one token's KV was made: everything that its value depends on."""

_UNIT = 8  # elements; divides every page width used in these tests


class PhysicalMemory:
    """Contents by unit of the arena (one plane of one layer is enough: all others are addressed alike)."""

    def __init__(self, geometry: KVGeometry) -> None:
        self._geometry = geometry
        self._units: dict[int, Content] = {}

    def write(self, page_class: PageClass, page: int, offset: int, content: Content) -> None:
        for unit in self._slot(page_class, page, offset):
            self._units[unit] = content

    def read(self, page_class: PageClass, page: int, offset: int) -> Content:
        """What the slot holds; what was never written, freed or half overwritten comes back as such."""
        found = [self._units.get(unit, ("nothing",)) for unit in self._slot(page_class, page, offset)]
        return found[0] if len(set(found)) == 1 else ("torn", *found)

    def forget(self, page_class: PageClass, page: int) -> None:
        for offset in range(self._geometry.page_size):
            for unit in self._slot(page_class, page, offset):
                self._units.pop(unit, None)

    def _slot(self, page_class: PageClass, page: int, offset: int) -> range:
        width = self._geometry.page_width(page_class)
        start = (page * self._geometry.page_size + offset) * width
        return range(start // _UNIT, (start + width) // _UNIT)


class WatchedPool(PagePool):
    """A page pool that wipes pages when they are handed out and when they come back.

    ``is_lazy``: at the next ``wipe``, as copies that were decided before may still have to read a page that is free now.
    """

    def __init__(self, geometry: KVGeometry, num_slabs: int, memory: PhysicalMemory, *, is_lazy: bool = False) -> None:
        super().__init__(geometry, num_slabs)
        self._memory = memory
        self._is_lazy = is_lazy
        self._unwiped: list[tuple[PageClass, int]] = []

    def allocate(self, page_class: PageClass, num_pages: int) -> list[int] | None:
        pages = super().allocate(page_class, num_pages)
        self._changed_hands(page_class, pages or [])
        return pages

    def free(self, page_class: PageClass, pages: list[int]) -> None:
        super().free(page_class, pages)
        self._changed_hands(page_class, pages)

    def wipe(self) -> None:
        """Pages that changed hands since the last call hold nothing."""
        for page_class, page in self._unwiped:
            self._memory.forget(page_class, page)
        self._unwiped.clear()

    def _changed_hands(self, page_class: PageClass, pages: list[int]) -> None:
        self._unwiped += [(page_class, page) for page in pages]
        if not self._is_lazy:
            self.wipe()


def copy_page(source: PhysicalMemory, target: PhysicalMemory, page_class: PageClass, pages: tuple[int, int], size: int) -> None:
    """A whole page of ``size`` tokens, from page pages[0] of ``source`` to page pages[1] of ``target``."""
    for offset in range(size):
        target.write(page_class, pages[1], offset, source.read(page_class, pages[0], offset))
