"""The slab allocator: against a naive model that knows which elements of the arena every page covers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.page_pool import PageClass, PagePool

GEOMETRY = KVGeometry(1, 2, 12, 4, 4, rank_classes=(8, 16))  # 2 base pages, 6 of rank 8, or 3 of rank 16 to a slab
CLASSES: tuple[PageClass, ...] = (None, 8, 16)


@pytest.fixture
def pool() -> PagePool:
    return PagePool(GEOMETRY, 4)


def test_fresh_pages_are_consecutive_and_lowest_first(pool: PagePool) -> None:
    assert pool.allocate(None, 5) == [0, 1, 2, 3, 4]


def test_the_lowest_free_page_is_reused_first(pool: PagePool) -> None:
    pool.allocate(8, 12)
    pool.free(8, [7])
    pool.free(8, [2])
    assert pool.allocate(8, 2) == [2, 7]


def test_a_class_takes_a_slab_only_when_its_own_are_full(pool: PagePool) -> None:
    assert pool.allocate(None, 1) == [0]
    assert pool.allocate(16, 1) == [3]  # slab 1 holds pages 3 to 5 of that class
    assert pool.allocate(None, 1) == [1]
    assert (pool.num_slabs_of(None), pool.num_slabs_of(16), pool.num_free_slabs) == (1, 1, 2)


def test_an_emptied_slab_serves_any_class(pool: PagePool) -> None:
    pages = pool.allocate(None, 8)
    assert pages is not None
    assert pool.allocate(8, 1) is None
    pool.free(None, [2, 3])
    assert pool.allocate(8, 6) == [6, 7, 8, 9, 10, 11]
    assert pool.allocate(None, 1) is None


def test_an_allocation_that_is_not_all_there_changes_nothing(pool: PagePool) -> None:
    pool.allocate(None, 3)
    assert pool.allocate(None, 6) is None
    assert (pool.num_allocated(None), pool.num_free_slabs, pool.num_allocatable(None)) == (3, 2, 5)
    assert pool.allocate(None, 5) == [3, 4, 5, 6, 7]


def test_nothing_is_allocated_for_a_demand_of_nothing(pool: PagePool) -> None:
    assert pool.allocate(None, 0) == []
    assert pool.num_used_slabs == 0


@pytest.mark.parametrize(("page_class", "page"), [(None, 2), (None, 0), (8, 3), (16, 0), (None, -1), (None, 99)])
def test_freeing_what_is_not_allocated_in_that_class_is_an_error(pool: PagePool, page_class: PageClass, page: int) -> None:
    pool.allocate(None, 2)
    pool.free(None, [0])
    with pytest.raises(ValueError, match=f"page {page} of class {page_class} is not allocated"):
        pool.free(page_class, [page])


def test_a_page_is_freed_once(pool: PagePool) -> None:
    pool.allocate(8, 2)
    pool.free(8, [1])
    with pytest.raises(ValueError, match="page 1 of class 8"):
        pool.free(8, [1])


def test_room_for_several_classes_is_asked_for_together(pool: PagePool) -> None:
    pool.allocate(None, 5)  # three slabs, one page of them free; one slab free
    assert pool.has_room({None: 3})
    assert pool.has_room({8: 6})
    assert pool.has_room({None: 1, 8: 6})
    assert not pool.has_room({None: 2, 8: 1})
    assert not pool.has_room({8: 1, 16: 1})


class PagePoolMachine(RuleBasedStateMachine):
    """``held``: pages by class, in the order they came."""

    @initialize(num_slabs=st.integers(1, 6))
    def start(self, num_slabs: int) -> None:
        self.num_slabs = num_slabs
        self.pool = PagePool(GEOMETRY, num_slabs)
        self.held: dict[PageClass, list[int]] = {c: [] for c in CLASSES}

    @rule(page_class=st.sampled_from(CLASSES), num_pages=st.integers(0, 8))
    def allocate(self, page_class: PageClass, num_pages: int) -> None:
        room = self._free_pages(page_class)
        pages = self.pool.allocate(page_class, num_pages)
        assert pages == (sorted(room, key=self._order(page_class))[:num_pages] if num_pages <= len(room) else None)
        self.held[page_class] += pages or []

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        page_class = data.draw(st.sampled_from([c for c in CLASSES if self.held[c]]))
        pages = data.draw(st.sets(st.sampled_from(self.held[page_class]), min_size=1))
        self.held[page_class] = [p for p in self.held[page_class] if p not in pages]
        self.pool.free(page_class, sorted(pages))

    def _slab_class(self) -> dict[int, PageClass]:
        return {page // GEOMETRY.pages_per_slab(c): c for c, pages in self.held.items() for page in pages}

    def _free_pages(self, page_class: PageClass) -> list[int]:
        """Pages of that class in slabs that are its own or nobody's."""
        per_slab, owner = GEOMETRY.pages_per_slab(page_class), self._slab_class()
        return [
            page
            for page in range(self.num_slabs * per_slab)
            if owner.get(page // per_slab, page_class) == page_class and page not in self.held[page_class]
        ]

    def _order(self, page_class: PageClass) -> Callable[[int], tuple[bool, int]]:
        """Slabs in use before fresh ones, then by number."""
        per_slab, owner = GEOMETRY.pages_per_slab(page_class), self._slab_class()
        return lambda page: (page // per_slab not in owner, page)

    @rule(demand=st.dictionaries(st.sampled_from(CLASSES), st.integers(0, 10)))
    def ask_for_room(self, demand: dict[PageClass, int]) -> None:
        """``has_room`` says what allocating it all would say."""
        taken: list[tuple[PageClass, list[int]]] = []
        is_served = True
        for page_class, num_pages in demand.items():
            pages = self.pool.allocate(page_class, num_pages) if is_served else None
            is_served = pages is not None
            taken += [(page_class, pages)] if pages is not None else []
        for page_class, pages in taken:
            self.pool.free(page_class, pages)
        assert self.pool.has_room(demand) == is_served

    @invariant()
    def counts_agree_and_no_two_pages_overlap(self) -> None:
        if not hasattr(self, "pool"):
            return
        covered: set[int] = set()
        for page_class, pages in self.held.items():
            assert self.pool.num_allocated(page_class) == len(pages)
            assert self.pool.num_allocatable(page_class) == len(self._free_pages(page_class))
            width = GEOMETRY.page_width(page_class) * GEOMETRY.page_size
            for page in pages:
                elements = set(range(page * width, (page + 1) * width))
                assert not elements & covered
                covered |= elements
        assert self.pool.num_used_slabs == len(self._slab_class())
        assert self.pool.num_free_slabs == self.num_slabs - len(self._slab_class())
        assert max(covered, default=0) < self.num_slabs * GEOMETRY.slab_elems


TestPagePool = PagePoolMachine.TestCase
TestPagePool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
