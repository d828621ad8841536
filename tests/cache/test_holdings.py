"""Whose pages the device holds, and what sharing saves, against a recount of the tree."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tests.cache.kv_world import Branch, World

CONTEXT = (0, 1, 0, 0, 1, 0, 1, 1, 0, 1)
NUM_PAGES = 3


def recounted(world: World) -> tuple[Counter[str], Counter[str]]:
    owners, adapters = Counter[str](), Counter[str]()
    for node in world.kv.tree.nodes():
        assert node.record is not None
        owners[node.record.owner] += world.geometry.page_bytes(None)
        for residual in node.residuals.values():
            num_bytes = world.geometry.page_bytes(residual.key.rank_class)
            owners[node.record.owner] += num_bytes
            adapters[residual.key.adapter] += num_bytes
    return owners, adapters


def test_bytes_follow_pages_filed_and_evicted() -> None:
    world = World()
    for adapter in ("a", "b", "c", None):
        world.run(Branch(CONTEXT, (1, 0, 1, 1, 0), adapter, "eager", owner=f"tenant of {adapter}"))
    holdings = world.manager.holdings
    for _ in range(200):
        assert (holdings.by_owner, holdings.by_adapter) == recounted(world)
        if not world.kv.tree.evict_oldest():
            break
    assert (holdings.by_owner, holdings.by_adapter, holdings.shared_savings) == ({}, {}, 0)


def test_the_first_who_needs_a_page_owns_it() -> None:
    world = World()
    for tenant in ("first", "second"):
        assert world.prepare(Branch(CONTEXT, (1,), "a", "eager", owner=tenant))
    assert set(world.manager.bytes_by_owner()) == {"first"}


def test_pages_that_are_claimed_and_not_filed_count_for_their_owner() -> None:
    world = World()
    turn = world.open_turn(Branch((), (1, 0, 1, 1, 0), "a", "isolated", owner="acme"))
    assert turn is not None
    assert world.manager.bytes_by_owner() == {"acme": 2 * world.geometry.page_bytes(None)}
    world.drop_turn(turn)
    assert world.manager.bytes_by_owner() == {}


def test_sharing_saves_a_base_page_for_each_further_adapter_less_the_residuals() -> None:
    world = World()
    branch, page_bytes = Branch(CONTEXT, (1,), "a", "eager"), world.geometry.page_bytes
    residuals = 0
    for count, (adapter, rank_class) in enumerate([("a", 8), ("b", 8), ("c", 16)], start=1):
        assert world.prepare(replace(branch, adapter=adapter))
        residuals += page_bytes(rank_class)
        # What ``count`` caches would need, less the one base page and the residuals.
        assert world.manager.holdings.shared_savings == NUM_PAGES * (count * page_bytes(None) - page_bytes(None) - residuals)
