"""The host tier behind the device: what goes there, what comes back, and what must never."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forkkv_cluster.cache.host_tier import HostEntry, HostTier
from forkkv_cluster.core.errors import Internal, InvalidArgument
from forkkv_cluster.core.ids import BlockHash
from tests.cache.kv_world import Branch, World, residual_key

CONTEXT = (0, 1, 0, 0, 1, 0, 1, 1, 0, 1)  # two blocks and a tail
EAGER = Branch(CONTEXT, (1, 1, 0, 1, 0, 1), "a", "eager")


def evict_all(world: World) -> None:
    while world.kv.tree.evict_oldest():
        pass
    world.check()


def tier(world: World) -> HostTier:
    assert world.kv.host is not None
    return world.kv.host


def slow_copies(world: World) -> None:
    tier(world).estimate.copied_bytes.note(1, 1e6)
    tier(world).estimate.prefilled_tokens.note(1e6, 1)


@pytest.mark.parametrize("sharing", ["eager", "residual", "base", "isolated"])
@pytest.mark.parametrize("adapter", ["a", "c", "n", None])
def test_what_was_evicted_comes_back_for_the_next_turn(sharing: str, adapter: str | None) -> None:
    world = World(num_host_slabs=64)
    branch = replace(EAGER, sharing=sharing, adapter=adapter)
    world.run(branch)
    evict_all(world)
    assert world.manager.base_bytes_held == world.manager.residual_bytes_held == 0
    found = world.run(branch)
    assert found >= len(branch.tokens) - 1 - (len(branch.tokens) - 1) % world.page_size
    world.check_idle()


def test_a_block_is_never_in_both_places() -> None:
    world = World(num_host_slabs=64)
    world.run(EAGER)
    evict_all(world)
    slow_copies(world)
    world.run(EAGER)  # computed again
    assert tier(world).num_swapped_in == 0
    on_device = {node.hash for node in world.kv.tree.nodes()}
    assert not any(entry.slot[0] in on_device for entry in tier(world).entries())


def test_what_is_dearer_to_copy_than_to_run_stays_on_the_host() -> None:
    world = World(num_host_slabs=64)
    world.run(EAGER)
    evict_all(world)
    held = len(tier(world))
    slow_copies(world)
    world.restore(EAGER)
    assert len(tier(world)) == held
    assert not world.context_is_here(EAGER)


def test_a_residual_alone_comes_back_over_a_base_that_stayed() -> None:
    world = World(num_host_slabs=64)
    world.run(EAGER)
    for node in sorted(world.kv.tree.nodes(), key=lambda n: -n.depth):
        for residual in list(node.residuals.values()):
            world.kv.tree.evict_residual(residual)
    world.check()
    assert not world.context_is_here(EAGER)
    world.restore(EAGER)
    world.check()
    assert world.context_is_here(EAGER)


def test_base_without_the_residual_that_a_pass_needs_saves_nothing_and_stays() -> None:
    """The pass for the residual runs from the first token, whether base KV is there or not."""
    world = World(num_host_slabs=64)
    assert world.prepare(replace(EAGER, sharing="base"))
    evict_all(world)
    world.restore(EAGER)
    assert not any(node.page is not None for node in world.kv.tree.nodes())


def test_nothing_comes_back_where_there_is_no_room() -> None:
    world = World(num_slabs=8, num_host_slabs=64)
    world.run(replace(EAGER, sharing="base"))
    evict_all(world)
    turn = world.open_turn(Branch((), (1, 0) * 30, "a", "isolated"))
    assert turn is not None
    held = len(tier(world))
    world.restore(replace(EAGER, sharing="base"))
    world.check()
    assert len(tier(world)) == held
    world.drop_turn(turn)


def test_the_least_recently_used_leaf_goes_first_when_the_host_is_full() -> None:
    world = World(num_slabs=32, num_host_slabs=2)  # 4 base pages
    for first in (0, 1):
        world.run(Branch((), (first, *CONTEXT[1:], 1, 1, 0), "a", "isolated"))  # three blocks
        evict_all(world)
    world.check()
    assert len(tier(world)) == 4
    old, new = (Branch((), (first, *CONTEXT[1:], 1, 1, 0), "a", "isolated") for first in (0, 1))
    assert (world.run(new), world.run(old)) == (12, 4)
    assert tier(world).bytes_held <= tier(world).total_bytes


def test_an_entry_evicted_before_its_copy_was_made_keeps_its_place_on_the_host() -> None:
    world = World(num_host_slabs=64)
    branch = replace(EAGER, sharing="base")
    world.run(branch)
    evict_all(world)
    held, copied = len(tier(world)), tier(world).num_swapped_out
    world.restore(branch)
    while world.kv.tree.evict_oldest():  # no copy has been made since the restore
        pass
    world.check()
    assert (len(tier(world)), tier(world).num_swapped_out, tier(world).num_swapped_in) == (held, copied, 0)
    world.run(branch)


def test_directories_hear_of_the_device_alone() -> None:
    """``World.check`` compares what the events say with what is on the device, in both directions."""
    world = World(num_host_slabs=64)
    world.run(EAGER)
    evict_all(world)
    assert world.directory.base == world.directory.residuals == set()
    assert len(tier(world)) > 0
    world.restore(EAGER)
    world.check()
    assert len(world.directory.base) == len(CONTEXT) // world.page_size


def test_a_branchs_own_tail_is_not_stored() -> None:
    world = World(num_host_slabs=64)
    world.run(Branch((), (1, 0, 1), "a", "isolated"))
    evict_all(world)
    assert len(tier(world)) == 0


def test_another_path_with_the_same_hash_is_not_served() -> None:
    geometry = World().geometry
    host = HostTier(geometry, 8 * geometry.slab_bytes)
    block = BlockHash(b"same")
    entry = HostEntry((block, None), None, np.array([1, 2, 3, 4], dtype=np.int32), 4)
    host._store(entry, 0)
    assert host.run([block], None, np.array([1, 2, 3, 4, 5], dtype=np.int32)) == [entry]
    assert host.run([block], None, np.array([1, 2, 3, 5, 5], dtype=np.int32)) == []
    assert host.run([block], None, np.array([1, 2, 3], dtype=np.int32)) == []


def test_losing_a_block_loses_all_that_hung_on_it() -> None:
    geometry = World().geometry
    host = HostTier(geometry, 8 * geometry.slab_bytes)
    key, tokens = residual_key("a", "eager"), np.zeros(12, dtype=np.int32)
    hashes = [BlockHash(bytes([i])) for i in range(3)]
    for index in (2, 1):  # leaf first, as the device evicts; block 0 is still there
        for kind in (key, None):
            host._store(HostEntry((hashes[index], kind), hashes[index - 1], tokens, 4 * index + 4), index)
    assert len(host) == 4
    host.lose((hashes[0], key))
    assert [(entry.slot[1], entry.slot[0]) for entry in host.entries()] == [(None, hashes[2]), (None, hashes[1])]
    host.lose((hashes[0], None))
    assert len(host) == host.bytes_held == 0
    assert host.take_swaps().outs == ()


def test_less_than_a_slab_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"cache\.host_bytes"):
        HostTier(World().geometry, 1)


# --- invariants --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored() -> World:
    world = World(num_host_slabs=64)
    world.run(EAGER)
    evict_all(world)
    return world


def test_a_host_page_without_an_owner_is_found(stored: World) -> None:
    tier(stored).pool.allocate(None, 1)
    with pytest.raises(Internal, match="with an owner"):
        stored.manager.check_invariants()


def test_a_block_without_the_one_before_it_is_found(stored: World) -> None:
    entry = next(e for e in tier(stored).entries() if e.above is None and e.slot[1] is None)
    del tier(stored)._entries[entry.slot]
    with pytest.raises(Internal, match="lacks what it depends on"):
        stored.manager.check_invariants()


def test_a_block_in_both_places_is_found(stored: World) -> None:
    entries = tier(stored).run(stored.context_key(EAGER).context[:1], None, stored.context_tokens(EAGER))
    stored.restore(EAGER)
    tier(stored)._entries[entries[0].slot] = entries[0]
    with pytest.raises(Internal, match="on the device, too"):
        stored.manager.check_invariants()


def test_a_leaf_out_of_the_eviction_order_is_found(stored: World) -> None:
    tier(stored)._lru.discard(tier(stored)._lru.oldest())  # type: ignore[arg-type]
    with pytest.raises(Internal, match="eviction order"):
        stored.manager.check_invariants()
