"""Whole K in borrowed slabs: borrowed only while there is memory to spare, given back before anything is evicted."""

from __future__ import annotations

import pytest

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.merged_keys import IDLE_STEPS, MergedIdentity, MergedKeys, MergedUse
from forkkv_cluster.cache.page_pool import PagePool
from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.ids import BlockHash
from tests.cache.kv_world import Branch, World

GEOMETRY = KVGeometry(num_layers=1, num_kv_heads=2, head_dim=4, page_size=32, dtype_bytes=2, rank_classes=(8,))
"""A slab holds K of one page: 32 tokens of 8 elements."""

NUM_SLABS = 32


@pytest.fixture
def pool() -> PagePool:
    return PagePool(GEOMETRY, NUM_SLABS)


@pytest.fixture
def merged(pool: PagePool) -> MergedKeys:
    return MergedKeys(GEOMETRY, pool, max_share=1.0)


def identity(name: str) -> MergedIdentity:
    return MergedIdentity(ResidualKey(name, "eager", 8), BlockHash(b"block"))


def use(merged: MergedKeys, name: str, num_tokens: int = 64) -> MergedUse:
    found = merged.use(identity(name), num_tokens, is_worth_making=True)
    assert found is not None
    assert merged.is_consistent()
    return found


def test_a_run_is_to_be_written_until_its_step_has_run(merged: MergedKeys) -> None:
    assert not use(merged, "a").is_written
    assert not use(merged, "a").is_written, "the same step asks for a second branch"
    merged.note_written()
    assert use(merged, "a").is_written
    assert not use(merged, "b").is_written


def test_two_adapters_share_the_two_planes_of_one_run(merged: MergedKeys, pool: PagePool) -> None:
    one, two, three = (use(merged, name).run for name in "abc")
    assert one.first_slab == two.first_slab
    assert {one.plane, two.plane} == {0, 1}
    assert three.first_slab != one.first_slab
    assert pool.num_borrowed_slabs == 4
    assert merged.bytes_held == 4 * GEOMETRY.slab_bytes


def test_nothing_is_made_that_is_not_worth_it_but_what_is_there_is_used(merged: MergedKeys) -> None:
    assert merged.use(identity("a"), 64, is_worth_making=False) is None
    made = use(merged, "a").run
    again = merged.use(identity("a"), 64, is_worth_making=False)
    assert again is not None
    assert again.run == made


def test_some_slabs_stay_free_for_the_next_request(merged: MergedKeys, pool: PagePool) -> None:
    names = iter(range(1000))
    while merged.use(identity(str(next(names))), 64, is_worth_making=True) is not None:
        pass
    assert 0 < pool.num_free_slabs <= NUM_SLABS // 8


def test_no_more_than_the_share_is_borrowed(pool: PagePool) -> None:
    merged = MergedKeys(GEOMETRY, pool, max_share=0.25)
    for name in range(100):
        merged.use(identity(str(name)), 64, is_worth_making=True)
    assert pool.num_borrowed_slabs == NUM_SLABS // 4


def test_the_run_that_was_used_longest_ago_is_given_back_first(merged: MergedKeys, pool: PagePool) -> None:
    for name in "abcd":
        use(merged, name)
    merged.note_written()
    for name in "cdab":
        use(merged, name)
    assert merged.give_back()
    assert merged.is_consistent()
    assert pool.num_borrowed_slabs == 2
    assert use(merged, "a").is_written
    assert not use(merged, "c").is_written


def test_a_run_taken_back_before_its_step_ended_is_not_written_when_it_comes_again(merged: MergedKeys) -> None:
    use(merged, "a")
    merged.give_back()
    merged.note_written()
    assert not use(merged, "a").is_written


def test_only_slabs_in_a_row_are_borrowed(pool: PagePool, merged: MergedKeys) -> None:
    taken = pool.allocate(None, NUM_SLABS)
    assert taken is not None
    pool.free(None, taken[::2])
    assert merged.use(identity("a"), 64, is_worth_making=True) is None
    pool.free(None, [taken[NUM_SLABS - 1]])
    assert use(merged, "a").run.first_slab == NUM_SLABS - 2


def test_without_any_there_is_nothing_to_give_back(merged: MergedKeys) -> None:
    assert not merged.give_back()


def test_a_request_takes_borrowed_memory_before_it_evicts_a_page() -> None:
    world = World(page_size=32, num_slabs=16)
    agent = Branch(tuple(range(1, 129)), (190, 191), "a", "eager")
    assert world.prepare(agent)
    turn = world.open_turn(agent)
    assert turn is not None
    world.manager.use_merged_keys(turn.lease, is_worth_making=True)
    world.manager.check_invariants()
    assert turn.lease.merged_keys is not None
    assert turn.lease.merged_keys.run.num_tokens == 128
    num_borrowed = world.manager.merged_bytes_held // world.geometry.slab_bytes
    assert num_borrowed > 0
    num_slabs = world.kv.pool.num_free_slabs + num_borrowed
    assert world.kv.allocate(None, num_slabs * world.geometry.pages_per_slab(None)) is not None
    assert world.manager.merged_bytes_held == 0
    assert world.manager.num_evictions == 0


def test_what_a_step_asked_for_and_did_not_write_is_not_written_by_the_next(merged: MergedKeys) -> None:
    use(merged, "a")
    merged.start_step()  # the step before ran no layer to its end
    use(merged, "b")
    merged.note_written()
    assert use(merged, "b").is_written
    assert not use(merged, "a").is_written
    merged.note_written()
    assert use(merged, "a").is_written


def test_a_run_that_nobody_has_used_for_long_makes_room_for_another(pool: PagePool) -> None:
    merged = MergedKeys(GEOMETRY, pool, max_share=0.125)  # two runs of two slabs
    for name in "abcd":
        use(merged, name)
    assert merged.use(identity("e"), 64, is_worth_making=True) is None, "all are in use"
    for _ in range(IDLE_STEPS):
        merged.start_step()
        use(merged, "a")
        use(merged, "b")
    use(merged, "e")
    assert merged.use(identity("c"), 64, is_worth_making=True) is not None
    assert merged.use(identity("f"), 64, is_worth_making=True) is None, "a, b, c and e are in use"


def test_a_failed_search_for_a_row_is_not_repeated_until_slabs_come_free(pool: PagePool) -> None:
    taken = pool.allocate(None, NUM_SLABS)
    assert taken is not None
    pool.free(None, taken[::2])
    assert pool.borrow(2) is None
    assert pool.borrow(3) is None
    assert pool.borrow(1) is not None
    pool.free(None, taken[1:4:2])
    assert pool.borrow(3) is not None


def test_a_full_pool_evicts_as_much_as_is_needed_and_no_more() -> None:
    world = World(page_size=4, num_slabs=8)
    for number in range(8):
        assert world.run(Branch(tuple(range(100 * number, 100 * number + 8)), (7,), None, "isolated")) == 0
    per_slab = world.geometry.pages_per_slab(None)
    free, evicted = world.kv.pool.num_allocatable(None), world.manager.num_evictions
    assert world.kv.allocate(None, free + per_slab) is not None
    assert world.manager.num_evictions - evicted <= 2 * per_slab
