"""The door of the cache: what it tells of itself, in numbers and events. Reads and writes are the World's to check."""

from __future__ import annotations

import numpy as np
import pytest

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.events import BaseEvicted, BaseStored, ResidualEvicted, ResidualStored
from forkkv_cluster.core.prefix import partial_hash
from forkkv_cluster.core.status import PoolStatus
from tests.cache.kv_world import Branch, World

CONTEXT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


@pytest.fixture
def world() -> World:
    return World(page_size=4, num_slabs=8)


def agent(adapter: str = "a") -> Branch:
    return Branch(CONTEXT, (11, 12, 13), adapter, "eager")


def isolated(first: int, num_tokens: int = 9) -> Branch:
    return Branch((), tuple(range(first, first + num_tokens)), "a", "isolated")


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_fresh_pool_is_free(world: World) -> None:
    (base,) = world.manager.pools()
    assert base == PoolStatus("base", world.geometry.page_bytes(None), 16, 16, 0, 0)
    assert world.manager.free_bytes == world.manager.total_bytes == 8 * world.geometry.slab_bytes


def test_pages_are_pinned_while_a_turn_runs_and_cached_after(world: World) -> None:
    assert world.prepare(agent())
    turn = world.open_turn(agent())
    assert turn is not None
    world.step_turn(turn)
    base, residual = world.manager.pools()
    # Pinned: two blocks of context and two pages of its own; cached: the context's tail, which was copied.
    assert (base.num_pinned, base.num_cached) == (4, 1)
    assert (residual.name, residual.num_pinned, residual.num_cached) == ("residual-r8", 2, 1)
    world.drop_turn(turn)
    assert [pool.num_pinned for pool in world.manager.pools()] == [0, 0]
    assert [pool.num_cached for pool in world.manager.pools()] == [5, 3]


def test_a_page_that_many_pin_counts_once(world: World) -> None:
    assert world.prepare(agent())
    for _ in range(3):
        assert world.open_turn(agent()) is not None
    base, residual = world.manager.pools()
    assert (base.num_pinned, residual.num_pinned) == (3 + 3 * 2, 3)


def test_bytes_follow_the_pages(world: World) -> None:
    page_bytes = world.geometry.page_bytes
    assert world.prepare(agent("a"))
    assert world.prepare(agent("c"))
    assert world.manager.base_bytes_held == 3 * page_bytes(None)
    assert world.manager.residual_bytes_held == 3 * page_bytes(8) + 3 * page_bytes(16)


def test_bytes_that_no_lease_protects_count_as_free(world: World) -> None:
    """A router must not shun a worker for what it has cached."""
    assert world.prepare(agent())
    assert world.manager.free_bytes == world.manager.total_bytes
    turn = world.open_turn(agent())
    assert turn is not None
    world.step_turn(turn)
    pinned = 4 * world.geometry.page_bytes(None) + 2 * world.geometry.page_bytes(8)
    assert world.manager.free_bytes == world.manager.total_bytes - pinned


def test_peaks_stay_when_pages_go(world: World) -> None:
    assert world.prepare(agent())
    world.check_idle()
    assert world.manager.base_bytes_held == world.manager.residual_bytes_held == 0
    assert world.manager.peak_bytes == (3 * world.geometry.page_bytes(None), 3 * world.geometry.page_bytes(8))


def test_leases_and_evictions_are_counted(world: World) -> None:
    turn = world.open_turn(isolated(0, 5))
    assert turn is not None
    assert world.manager.num_leases == 1
    world.drop_turn(turn)
    assert world.manager.num_leases == 0
    world.run(isolated(0, 8))
    assert world.manager.num_evictions == 0
    world.check_idle()
    assert world.manager.num_evictions == 2


def test_memory_for_less_than_one_slab_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"kv_bytes=0: is less than one slab"):
        World(num_slabs=0)


# --- eviction ---------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_when_memory_is_short(world: World) -> None:
    for first in (100, 200, 300, 400, 500):  # three pages each: sixteen do not hold a sixth
        world.run(isolated(first))
    world.run(isolated(100))
    world.run(isolated(600))
    world.run(isolated(700))
    assert world.run(isolated(100)) == 8
    assert world.run(isolated(200)) < 8


def test_a_turn_that_cannot_fit_evicts_nothing_while_others_run(world: World) -> None:
    world.run(isolated(100))
    running = world.open_turn(isolated(200, 40))
    assert running is not None
    assert world.open_turn(isolated(300, 40)) is None
    assert world.manager.num_evictions == 0
    assert world.run(isolated(100)) == 8


def test_a_pass_whose_classes_do_not_fit_together_evicts_nothing() -> None:
    """Three base pages alone would fit, and six residual pages alone; both do not, even if all that is cached went."""
    world = World(page_size=4, num_slabs=3)
    assert world.open_turn(isolated(200, 8)) is not None  # one slab
    world.run(isolated(100, 4))  # half a slab
    keys = [branch.residual for branch in (agent("a"), agent("b")) if branch.residual is not None]
    assert world.open_pass(Branch((*CONTEXT, 11, 12), ()), keys) is None
    assert world.manager.num_evictions == 0


# --- events -----------------------------------------------------------------------------------------------------------


def test_whole_blocks_are_announced_and_tails_are_not(world: World) -> None:
    assert world.prepare(agent())
    key = world.context_key(agent())
    base, residual = world.manager.take_events()
    assert base == BaseStored(key.context)
    assert isinstance(residual, ResidualStored)
    assert (residual.adapter, residual.semantics, residual.hashes) == ("a", "eager", key.context)


def test_own_blocks_are_announced_under_their_own_hashes(world: World) -> None:
    world.run(isolated(0))
    world.manager.take_events()
    world.run(isolated(100, 9))
    # check() has applied and taken the events in between; the directory knows both.
    for first in (0, 100):
        assert set(isolated(first).key(4).own) <= world.directory.base


def test_eviction_announces_residuals_before_their_base(world: World) -> None:
    assert world.prepare(agent())
    world.manager.take_events()
    while world.kv.tree.evict_oldest():
        pass
    kinds = [type(event) for event in world.manager.take_events()]
    assert set(kinds) == {ResidualEvicted, BaseEvicted}
    assert kinds.index(ResidualEvicted) < kinds.index(BaseEvicted)
    assert world.manager.snapshot_events() == ()


def test_a_snapshot_names_parents_before_children(world: World) -> None:
    world.run(agent())
    world.run(agent("c"))
    base, *residuals = world.manager.snapshot_events()
    assert isinstance(base, BaseStored)
    chain = world.context_key(agent()).context
    assert [base.hashes.index(block) for block in chain] == sorted(base.hashes.index(block) for block in chain)
    assert {(e.adapter, e.hashes) for e in residuals if isinstance(e, ResidualStored)} == {("a", chain), ("c", chain)}


def test_a_tails_hash_never_leaves_the_worker(world: World) -> None:
    world.run(agent())
    key = world.context_key(agent())
    tail = partial_hash(key.context[-1], np.array(CONTEXT[8:], dtype=np.int32))
    assert tail in world.kv.tree
    assert tail not in world.directory.base
