"""Passes over shared context: where they start, what they write, what they leave."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forkkv_cluster.cache.tree_nodes import ResidualKey
from tests.cache.kv_world import Branch, World, residual_key

CONTEXT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # two and a half pages of four
SHARED = Branch(CONTEXT, ())


def eager(adapter: str) -> ResidualKey:
    key = residual_key(adapter, "eager")
    assert key is not None
    return key


@pytest.fixture
def world() -> World:
    return World(page_size=4, num_slabs=32)


def found(world: World, residual: ResidualKey | None = None, context: tuple[int, ...] = CONTEXT) -> tuple[int, int]:
    tokens = np.array(context, dtype=np.int32)
    match = world.manager.match_context(world.context_key(replace(SHARED, context=context)), tokens, len(tokens), residual)
    return match.base_len, match.residual_len


def write(world: World, *required: ResidualKey, context: tuple[int, ...] = CONTEXT) -> None:
    item = world.open_pass(replace(SHARED, context=context), required)
    assert item is not None
    world.step_pass(item)
    world.check()


# --- matching ---------------------------------------------------------------------------------------------------------


def test_nothing_is_found_of_a_context_that_nobody_wrote(world: World) -> None:
    assert found(world, eager("a")) == (0, 0)


def test_a_pass_is_found_block_by_block_and_its_tail_at_the_end(world: World) -> None:
    item = world.open_pass(SHARED, [eager("a")])
    assert item is not None
    seen = []
    for _ in range(5):
        world.step_pass(item, 2)
        world.check()
        seen.append(found(world, eager("a")))
    assert seen == [(0, 0), (4, 4), (4, 4), (8, 8), (10, 10)]


def test_without_a_residual_its_match_is_the_base_match(world: World) -> None:
    write(world)
    assert found(world) == (10, 10)
    assert found(world, eager("a")) == (10, 0)


def test_the_two_semantics_of_a_residual_never_serve_each_other(world: World) -> None:
    write(world, eager("a"))
    own = residual_key("a", "residual")
    assert found(world, own) == (10, 0)


def test_a_shorter_context_finds_whole_blocks_alone(world: World) -> None:
    write(world, eager("a"))
    assert found(world, eager("a"), CONTEXT[:7]) == (4, 4)


def test_a_longer_context_runs_the_cut_tail_again(world: World) -> None:
    """After a join the old tail is the start of a fuller page: the base model runs it again."""
    write(world, eager("a"))
    longer = (*CONTEXT, 11, 12, 13)
    assert found(world, eager("a"), longer) == (8, 8)
    item = world.open_pass(replace(SHARED, context=longer), [eager("a")])
    assert item is not None
    assert (item.lease.run_start, item.lease.base_start) == (8, 8)


def test_matching_changes_nothing(world: World) -> None:
    write(world, eager("a"))
    write(world, context=(50, 51, 52, 53))
    before = list(world.kv.tree._lru)
    found(world, eager("a"))
    assert list(world.kv.tree._lru) == before
    assert world.manager.take_events() == ()


# --- where a pass starts ----------------------------------------------------------------------------------------------


def test_a_late_adapter_runs_the_context_and_writes_its_residual_alone(world: World) -> None:
    write(world, eager("a"))
    base = world.kv.pool.num_allocated(None)
    item = world.open_pass(SHARED, [eager("c")])
    assert item is not None
    assert (item.lease.run_start, item.lease.base_start) == (0, 10)
    world.step_pass(item)
    assert world.kv.pool.num_allocated(None) == base
    assert found(world, eager("c")) == (10, 10)


def test_a_pass_starts_where_the_shortest_required_residual_ends(world: World) -> None:
    write(world, eager("a"))
    write(world, eager("b"), context=CONTEXT[:4])
    item = world.open_pass(SHARED, [eager("a"), eager("b")])
    assert item is not None
    assert item.lease.run_start == 4
    assert [plan.key.adapter for plan in item.lease.residuals] == ["b"]  # a has all of it


def test_an_optional_residual_joins_a_pass_that_it_reaches(world: World) -> None:
    write(world, eager("a"), context=CONTEXT[:4])
    item = world.open_pass(SHARED, (), [eager("a"), eager("c")])
    assert item is not None
    assert item.lease.run_start == 4
    assert [plan.key.adapter for plan in item.lease.residuals] == ["a"]  # c would need the tokens before


def test_an_optional_residual_that_reaches_further_is_written_from_where_it_ends(world: World) -> None:
    write(world, eager("a"), context=CONTEXT[:4])
    item = world.open_pass(SHARED, [eager("c")], [eager("a")])
    assert item is not None
    assert [(plan.key.adapter, plan.start) for plan in item.lease.residuals] == [("c", 0), ("a", 4)]
    world.step_pass(item)
    world.check()
    assert found(world, eager("a")) == found(world, eager("c")) == (10, 10)


def test_one_key_in_both_lists_is_projected_once(world: World) -> None:
    item = world.open_pass(SHARED, [eager("a")], [eager("a"), eager("b")])
    assert item is not None
    assert [plan.key.adapter for plan in item.lease.residuals] == ["a", "b"]


# --- what a pass leaves -----------------------------------------------------------------------------------------------


def test_a_dropped_pass_leaves_whole_blocks_and_gives_the_rest_back(world: World) -> None:
    item = world.open_pass(SHARED, [eager("a")])
    assert item is not None
    world.step_pass(item, 7)
    world.drop_pass(item)
    world.check()
    assert found(world, eager("a")) == (4, 4)
    assert world.kv.pool.num_allocated(None) == 1
    assert world.kv.pool.num_allocated(8) == 1


def test_two_passes_over_one_context_keep_one_set_of_pages(world: World) -> None:
    first = world.open_pass(SHARED, [eager("a")])
    second = world.open_pass(SHARED, [eager("a")])
    assert first is not None
    assert second is not None
    world.step_pass(first)
    world.step_pass(second, 5)
    world.check()
    world.step_pass(second)
    world.check()
    assert world.kv.pool.num_allocated(None) == 3
    assert world.kv.pool.num_allocated(8) == 3


def test_a_pass_is_released_once(world: World) -> None:
    item = world.open_pass(SHARED)
    assert item is not None
    world.drop_pass(item)
    with pytest.raises(ValueError, match="twice"):
        world.manager.release_context(item.lease)


def test_a_hash_collision_stops_the_filing_and_leaks_nothing(world: World) -> None:
    write(world, eager("a"))
    held = world.kv.pool.num_allocated(None), world.kv.pool.num_allocated(8)
    other = np.array([90 + t for t in CONTEXT], dtype=np.int32)
    lease = world.manager.open_context(world.context_key(SHARED), other, len(other), [eager("a")])
    assert lease is not None
    assert lease.run_start == 0
    world.manager.commit_context(lease, len(other))
    assert lease.is_detached
    world.manager.release_context(lease)
    world.manager.check_invariants()
    assert (world.kv.pool.num_allocated(None), world.kv.pool.num_allocated(8)) == held


# --- room -------------------------------------------------------------------------------------------------------------


def test_a_pass_without_room_claims_nothing(world: World) -> None:
    running = world.open_pass(Branch(tuple(range(200)), ()))
    assert running is not None
    assert world.open_pass(Branch(tuple(range(300, 400)), ()), [eager("a")]) is None
    assert world.manager.num_leases == 1
    world.check()


def test_optional_residuals_are_left_out_when_there_is_no_room_for_them() -> None:
    """A request must not wait for ever for room that only its neighbours' residuals need."""
    world = World(page_size=4, num_slabs=3)  # two slabs for the base, one for one adapter's residual
    item = world.open_pass(SHARED, [eager("a")], [eager("b"), eager("c")])
    assert item is not None
    assert [plan.key.adapter for plan in item.lease.residuals] == ["a"]
    world.step_pass(item)
    world.check()
    assert found(world, eager("a")) == (10, 10)


def test_an_optional_residual_that_is_left_out_is_not_left_pinned() -> None:
    world = World(page_size=4, num_slabs=4)
    write(world, eager("c"), context=CONTEXT[:4])
    item = world.open_pass(Branch((*CONTEXT, *range(20, 30)), ()), (), [eager("c")])
    assert item is not None
    assert item.lease.residuals == []
    world.check()
    world.drop_pass(item)
    world.check_idle()


def test_a_request_whose_match_lies_scattered_gets_through_at_its_retry() -> None:
    """One residual page in each of two slabs: not enough whole slabs are left, though the bytes are there."""
    world = World(page_size=1, num_slabs=8)
    for length in range(1, 7):  # the pages of a and b alternate
        assert world.prepare(Branch(CONTEXT[:length], (), "a", "eager"))
        assert world.prepare(Branch(tuple(50 + t for t in CONTEXT[:length]), (), "b", "eager"))
    turn = Branch(CONTEXT[:6], (11, 12, 13, 14, 15, 16, 17), "a", "eager")  # 13 base pages, 6 residual pages: 8 slabs
    assert world.context_is_here(turn)
    assert world.open_turn(turn) is None
    assert world.prepare(turn)
    assert world.open_turn(turn) is not None
    world.check()


def test_a_pass_whose_residual_lies_scattered_gets_through_at_its_retry() -> None:
    """One page of it in each of four slabs, of which an empty pool would need two."""
    world = World(page_size=1, num_slabs=9)
    other, filler = (50, 51, 52, 53, 54), iter([eager("b"), residual_key("b", "residual"), residual_key("a", "residual")])
    for length in range(1, 5):
        write(world, eager("a"), context=CONTEXT[:length])
        key = next(filler, None)  # five more pages: the slab is full
        if key is not None:
            write(world, key, context=other)
    longer = Branch((*CONTEXT, 11, 12), ())
    assert world.open_pass(longer, [eager("a")]) is None
    item = world.open_pass(longer, [eager("a")])
    assert item is not None
    world.step_pass(item)
    world.check()
