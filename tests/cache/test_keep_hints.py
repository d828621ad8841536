"""Hints: what they cover, how long, and that they cover no more than their share."""

from __future__ import annotations

import pytest

from forkkv_cluster.cache.host_tier import Slot
from forkkv_cluster.cache.keep_hints import KeepHints
from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.ids import BlockHash
from tests.cache.kv_world import Branch, World, residual_key

CONTEXT, OTHER = (0, 1, 0, 0, 1, 0, 1, 1), (1, 1, 1, 0, 1, 0, 1, 1)


def slot(index: int) -> Slot:
    return BlockHash(bytes([index])), None


def pages(*indices: int, num_bytes: int = 10) -> list[tuple[Slot, int]]:
    return [(slot(i), num_bytes) for i in indices]


def test_a_hint_covers_its_pages_until_it_expires() -> None:
    hints = KeepHints(100)
    assert hints.put("s", pages(1, 2), expires_s=5.0) == ({slot(1), slot(2)}, set())
    assert hints.expire(4.9) == set()
    assert slot(1) in hints
    assert hints.expire(5.0) == {slot(1), slot(2)}
    assert (slot(1) in hints, hints.kept_bytes, len(hints)) == (False, 0, 0)


def test_a_page_under_two_hints_counts_once_and_is_kept_until_both_end() -> None:
    hints = KeepHints(30)
    hints.put("s", pages(1, 2), 5.0)
    assert hints.put("t", pages(2, 3), 9.0) == ({slot(3)}, set())
    assert hints.kept_bytes == 30
    assert hints.release("s") == {slot(1)}
    assert hints.expire(9.0) == {slot(2), slot(3)}


def test_hints_cover_the_first_pages_that_fit() -> None:
    hints = KeepHints(25)
    assert hints.put("s", pages(1, 2, 3, 4), 5.0)[0] == {slot(1), slot(2)}
    assert hints.put("t", pages(1, 5), 5.0)[0] == set()
    assert hints.bytes_by_name() == {"s": 20, "t": 10}


def test_a_second_hint_of_a_session_replaces_the_first() -> None:
    hints = KeepHints(100)
    hints.put("s", pages(1, 2), 5.0)
    assert hints.put("s", pages(2, 3), 9.0) == ({slot(3)}, {slot(1)})
    assert hints.expire(5.0) == set()
    assert hints.expire(9.0) == {slot(2), slot(3)}


def test_releasing_an_unknown_hint_is_harmless() -> None:
    assert KeepHints(10).release("nobody") == set()


# --- in the cache ------------------------------------------------------------------------------------------------------


def keep(world: World, context: tuple[int, ...], expires_s: float = 60.0, adapters: str = "") -> None:
    """Of session ``s``."""
    branch = Branch(context, ())
    tokens = world.context_tokens(branch)
    keys = [residual_key(name, "eager") for name in adapters]
    world.manager.keep_context("s", world.context_key(branch), tokens, len(tokens), keys, expires_s)  # type: ignore[arg-type]


def held(world: World, context: tuple[int, ...]) -> bool:
    return world.context_is_here(Branch(context, (), adapter="a", sharing="base"))


@pytest.fixture
def world() -> World:
    """Two contexts of two blocks; the first is the older one."""
    world = World(num_slabs=8)
    for context in (CONTEXT, OTHER):
        assert world.prepare(Branch(context, (0,), "a", "base"))
    return world


def test_a_kept_context_is_evicted_after_younger_ones(world: World) -> None:
    keep(world, CONTEXT)
    for _ in range(2):
        world.kv.tree.evict_oldest()
    assert (held(world, CONTEXT), held(world, OTHER)) == (True, False)


@pytest.mark.parametrize("end", ["release", "expire"])
def test_a_hint_that_has_ended_protects_nothing(world: World, end: str) -> None:
    keep(world, CONTEXT, expires_s=60.0)
    if end == "release":
        world.manager.release_hint("s")
    else:
        world.manager.expire_hints(60.0)
    world.check()
    for _ in range(4):
        world.kv.tree.evict_oldest()
    assert len(world.kv.tree) == 0


def test_a_hint_never_blocks_an_allocation(world: World) -> None:
    keep(world, CONTEXT)
    world.run(Branch((), (1, 0) * 30, "a", "isolated"))  # all of the pool
    assert not held(world, CONTEXT)


def test_a_kept_block_that_comes_back_is_kept_again(world: World) -> None:
    keep(world, CONTEXT)
    while world.kv.tree.evict_oldest():
        pass
    for context in (CONTEXT, OTHER):
        assert world.prepare(Branch(context, (0,), "a", "base"))
    world.check()
    for _ in range(2):
        world.kv.tree.evict_oldest()
    assert (held(world, CONTEXT), held(world, OTHER)) == (True, False)


def test_hints_cover_at_most_half_of_the_pool() -> None:
    world = World(num_slabs=8)  # 16 base pages
    context = CONTEXT * 5  # 10 pages
    assert world.prepare(Branch(context, (0,), "a", "base"))
    keep(world, context)
    assert sum(node.is_kept for node in world.kv.tree.nodes()) == 8
    assert world.manager.kept_bytes() == {"s": world.manager.total_bytes // 2}


def test_residuals_of_a_kept_context_are_kept_with_it() -> None:
    world = World(num_slabs=16)
    assert world.prepare(Branch(CONTEXT, (0,), "a", "eager"))
    assert world.prepare(Branch(CONTEXT, (0,), "b", "eager"))
    keep(world, CONTEXT, adapters="a")
    for _ in range(2):
        world.kv.tree.evict_oldest()
    assert world.context_is_here(Branch(CONTEXT, (0,), "a", "eager"))
    assert not world.context_is_here(Branch(CONTEXT, (0,), "b", "eager"))


def test_an_entry_marked_without_a_hint_is_found(world: World) -> None:
    world.kv.tree.set_kept(next(world.kv.tree.nodes()), True)
    with pytest.raises(Internal, match="kept, wrongly"):
        world.manager.check_invariants()
