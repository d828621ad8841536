"""The check notices: every structure broken on purpose is reported, and a sound one is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from forkkv_cluster.cache.tree_nodes import Node, PathRecord, Residual
from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.ids import BlockHash
from tests.cache.kv_world import Branch, World

CONTEXT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


@pytest.fixture
def world() -> World:
    """Cached: a context of two blocks and a tail, with a residual; running: a branch of it, and a pass over another."""
    world = World(page_size=4, num_slabs=32)
    branch = Branch(CONTEXT, (11, 12, 13), "a", "eager")
    world.run(branch)
    turn = world.open_turn(Branch(CONTEXT, (15, 16), "a", "eager"))
    item = world.open_pass(Branch((*CONTEXT, 20, 21), ()), [branch.residual] if branch.residual is not None else [])
    assert turn is not None
    assert item is not None
    world.step_pass(item, 2)
    return world


def nodes(world: World) -> list[Node]:
    return sorted(world.kv.tree.nodes(), key=lambda node: (node.end, node.hash))


def residuals(world: World) -> list[Residual]:
    return [residual for node in nodes(world) for residual in node.residuals.values()]


def test_a_sound_world_passes(world: World) -> None:
    world.manager.check_invariants()


def lose_a_page(world: World) -> None:
    world.kv.pool.allocate(None, 1)


def lose_a_residual_page(world: World) -> None:
    world.kv.pool.allocate(8, 1)


def free_a_page_in_use(world: World) -> None:
    world.kv.pool.free(None, [int(world.turns[0].lease.pages[-1])])


def share_a_private_page(world: World) -> None:
    lease = world.passes[0].lease
    lease.record.pages[-1] = world.turns[0].lease.pages[-1]


def write_into_a_cached_page(world: World) -> None:
    lease = world.turns[0].lease
    lease.record.pages[lease.num_pages - 1] = nodes(world)[0].page or 0


def file_one_residual_page_twice(world: World) -> None:
    first, second, *_ = residuals(world)
    second.page = first.page


def forget_a_pin(world: World) -> None:
    world.turns[0].lease.pinned.pins -= 1  # type: ignore[union-attr]


def leak_a_pin(world: World) -> None:
    nodes(world)[0].pins += 1


def forget_the_pin_of_a_residual(world: World) -> None:
    world.turns[0].lease.residual_pin.pins -= 1  # type: ignore[union-attr]


def forget_the_pin_of_a_tail(world: World) -> None:
    world.turns[0].lease.tail.node.pins -= 1  # type: ignore[union-attr]


def forget_the_pin_of_a_plan(world: World) -> None:
    world.passes[0].lease.residuals[0].pinned.pins -= 1  # type: ignore[union-attr]


def forget_a_lease(world: World) -> None:
    world.manager._book.remove(world.turns[0].lease)


def evict_what_a_lease_reads(world: World) -> None:
    tail = world.turns[0].lease.tail
    assert tail is not None
    tail.node.pins = 0
    for child in list(tail.node.children.values()):
        world.kv.tree.evict_base(child)
    world.kv.tree.evict_base(tail.node)


def drop_a_leaf_from_the_eviction_order(world: World) -> None:
    world.kv.tree._lru.discard(next(n for n in nodes(world) if n.is_evictable))


def list_a_parent_as_evictable(world: World) -> None:
    world.kv.tree._lru.add_newest(nodes(world)[0])


def list_a_pinned_residual_as_evictable(world: World) -> None:
    world.kv.tree._lru.add_newest(world.turns[0].lease.residual_pin)  # type: ignore[arg-type]


def take_a_page_from_a_node(world: World) -> None:
    nodes(world)[0].page = None


def cut_a_node_off_its_parent(world: World) -> None:
    node = nodes(world)[1]
    node.parent.children.pop(node.hash)  # type: ignore[union-attr]


def remove_the_residual_above_another(world: World) -> None:
    nodes(world)[0].residuals.clear()


def miscount_the_residuals_below(world: World) -> None:
    residuals(world)[0].num_children += 1


def leave_an_empty_seed(world: World) -> None:
    seed = BlockHash(b"nobody")
    world.kv.tree._seeds[seed] = Node(seed, None, None, -1, 0, 0, PathRecord(np.zeros(0, np.int32), np.zeros(0, np.int32)))


def cut_a_fork_off_its_context(world: World) -> None:
    fork = next(seed for seed in world.kv.tree.seeds() if seed.parent is not None)
    fork.parent.forks.pop(fork.hash)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("break_it", "report"),
    [
        (lose_a_page, r"\d+ pages of class None are allocated but \d+ have an owner"),
        (lose_a_residual_page, r"\d+ pages of class 8 are allocated but \d+ have an owner"),
        (free_a_page_in_use, r"pages of class None are allocated but"),
        (share_a_private_page, r"page \d+ of class None has 2 owners"),
        (write_into_a_cached_page, r"page \d+ of class None has 2 owners"),
        (file_one_residual_page_twice, r"page \d+ of class 8 has 2 owners"),
        (forget_a_pin, r"an entry has \d+ pins, leases hold"),
        (leak_a_pin, r"an entry has 1 pins, leases hold 0"),
        (forget_the_pin_of_a_residual, r"pins, leases hold"),
        (forget_the_pin_of_a_tail, r"pins, leases hold"),
        (forget_the_pin_of_a_plan, r"pins, leases hold"),
        (forget_a_lease, r"have an owner.*pins, leases hold"),
        (evict_what_a_lease_reads, r"pinned entries are not in the tree"),
        (drop_a_leaf_from_the_eviction_order, r"not in the eviction order, wrongly"),
        (list_a_parent_as_evictable, r"at depth 0 is in the eviction order, wrongly"),
        (list_a_pinned_residual_as_evictable, r"residual of a .* wrongly in or out of the eviction order"),
        (take_a_page_from_a_node, r"at depth 0 has no page"),
        (cut_a_node_off_its_parent, r"at depth 1 is not a child of its parent"),
        (remove_the_residual_above_another, r"residual of a at block .* at depth 1 has none above it"),
        (miscount_the_residuals_below, r"residual of a at block .* counts 2 below, not 1"),
        (leave_an_empty_seed, r"seed .* has nothing below it"),
        (cut_a_fork_off_its_context, r"seed .* is not a fork of its parent"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_structure_is_reported(world: World, break_it: Callable[[World], None], report: str) -> None:
    break_it(world)
    with pytest.raises(Internal, match=report):
        world.manager.check_invariants()
