"""Values of the routing decision."""

from __future__ import annotations

from forkkv_cluster.core.ids import BlockHash, new_id
from forkkv_cluster.core.placement import PlacementRequest

X, Y = BlockHash(b"x"), BlockHash(b"y")


def placement(context: tuple[BlockHash, ...], own: tuple[BlockHash, ...]) -> PlacementRequest:
    return PlacementRequest("r", context, own, None, None, "eager", 3)


def test_a_request_meets_others_at_its_first_block_of_context() -> None:
    assert placement((X,), (Y,)).root == X


def test_without_context_its_first_own_block_is_the_root() -> None:
    assert placement((), (Y, X)).root == Y


def test_a_prompt_shorter_than_a_block_has_no_root() -> None:
    assert placement((), ()).root is None


def test_ids_are_unique_and_say_what_they_name() -> None:
    ids = {new_id("request") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(i.startswith("request-") and len(i) == len("request-") + 16 for i in ids)
