"""The order of eviction."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from forkkv_cluster.cache.eviction import LruList


def test_the_oldest_goes_first() -> None:
    lru: LruList[str] = LruList()
    for entry in "abc":
        lru.add_newest(entry)
    assert lru.oldest() == "a"


def test_looking_at_the_oldest_keeps_it() -> None:
    lru: LruList[str] = LruList()
    lru.add_newest("a")
    assert lru.oldest() == lru.oldest() == "a"
    assert len(lru) == 1


def test_an_empty_list_has_no_oldest() -> None:
    assert LruList[str]().oldest() is None


def test_what_is_added_as_oldest_goes_next() -> None:
    lru: LruList[str] = LruList()
    lru.add_newest("a")
    lru.add_oldest("b")
    assert list(lru) == ["b", "a"]


def test_discarding_what_is_not_there_does_nothing() -> None:
    lru: LruList[str] = LruList()
    lru.add_newest("a")
    lru.discard("b")
    assert list(lru) == ["a"]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["newest", "oldest", "discard"]), st.integers(0, 5))))
def test_it_keeps_the_order_of_a_plain_queue(steps: list[tuple[str, int]]) -> None:
    lru: LruList[int] = LruList()
    queue: deque[int] = deque()
    for step, entry in steps:
        if entry in queue:
            queue.remove(entry)
        if step == "newest":
            lru.add_newest(entry)
            queue.append(entry)
        elif step == "oldest":
            lru.add_oldest(entry)
            queue.appendleft(entry)
        else:
            lru.discard(entry)
        assert list(lru) == list(queue)
        assert lru.oldest() == (queue[0] if queue else None)
        assert [e in lru for e in range(6)] == [e in queue for e in range(6)]
