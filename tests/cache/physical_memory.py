"""KV memory as a device has it: what every element of the arena holds, so that a page served wrongly reads wrong.

The arena's layout (``cache.geometry``) is honoured: pages of different classes are views of the same elements, so two
pages that overlap destroy each other here as they would on a device. So do a page and whole K in the same slabs.
"""

from __future__ import annotations

from collections.abc import Sequence

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.merged_keys import MergedRun, whole_key_blocks
from forkkv_cluster.cache.page_pool import PageClass, PagePool

Content = tuple[object, ...]
"""How one token's KV was made: everything that its value depends on."""

_UNIT = 8  # elements; divides every page width used in these tests


class PhysicalMemory:
    """Contents by unit of the arena (one plane of one layer is enough for pages: all others are addressed alike). Whole K lies
    in one plane alone, and in which order is for attention to choose: any write to its memory destroys it as a whole."""

    def __init__(self, geometry: KVGeometry) -> None:
        self._geometry = geometry
        self._units: dict[int, Content] = {}
        self._runs: dict[MergedRun, tuple[Content, ...]] = {}

    def write(self, page_class: PageClass, page: int, offset: int, content: Content) -> None:
        units = self._slot(page_class, page, offset)
        self._runs = {run: held for run, held in self._runs.items() if not _overlap(self._run(run), units)}
        for unit in units:
            self._units[unit] = content

    def write_whole_keys(self, run: MergedRun, contents: Sequence[Content]) -> None:
        """Of positions 0, 1, ..."""
        units = self._run(run)
        self._runs = {
            other: held
            for other, held in self._runs.items()
            if other.plane != run.plane or not _overlap(self._run(other), units)
        }
        for unit in units:
            self._units[unit] = ("whole keys",)
        self._runs[run] = tuple(contents)

    def read_whole_keys(self, run: MergedRun) -> tuple[Content, ...]:
        """What a run holds of positions 0, 1, ...; nothing once anybody has written there since."""
        return self._runs.get(run, ())

    def read(self, page_class: PageClass, page: int, offset: int) -> Content:
        """What the slot holds; what was never written, freed or half overwritten comes back as such."""
        found = [self._units.get(unit, ("nothing",)) for unit in self._slot(page_class, page, offset)]
        return found[0] if len(set(found)) == 1 else ("torn", *found)

    def forget(self, page_class: PageClass, page: int) -> None:
        for offset in range(self._geometry.page_size):
            for unit in self._slot(page_class, page, offset):
                self._units.pop(unit, None)

    def _run(self, run: MergedRun) -> range:
        start = run.first_slab * self._geometry.slab_elems
        width = whole_key_blocks(run.num_tokens) * self._geometry.base_width
        return range(start // _UNIT, (start + width) // _UNIT)

    def _slot(self, page_class: PageClass, page: int, offset: int) -> range:
        width = self._geometry.page_width(page_class)
        start = (page * self._geometry.page_size + offset) * width
        return range(start // _UNIT, (start + width) // _UNIT)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


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
