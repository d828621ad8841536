"""Facts about blocks, as few events."""

from __future__ import annotations

from forkkv_cluster.cache.event_log import EventLog
from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.events import BaseEvicted, BaseStored, ResidualEvicted, ResidualStored
from forkkv_cluster.core.ids import AdapterDigest, BlockHash

A, B = ResidualKey("a", "eager", 8), ResidualKey("b", "eager", 8)
DIGEST_A, DIGEST_B = AdapterDigest("a"), AdapterDigest("b")
X, Y, Z = BlockHash(b"x"), BlockHash(b"y"), BlockHash(b"z")


def test_consecutive_blocks_of_one_kind_become_one_event() -> None:
    log = EventLog()
    for block in (X, Y, Z):
        log.base_stored(block)
    assert log.take() == (BaseStored((X, Y, Z)),)


def test_the_order_of_different_kinds_is_kept() -> None:
    log = EventLog()
    log.base_stored(X)
    log.base_evicted(X)
    log.base_stored(X)
    assert log.take() == (BaseStored((X,)), BaseEvicted((X,)), BaseStored((X,)))


def test_adapters_and_semantics_are_kept_apart() -> None:
    log = EventLog()
    log.residual_stored(A, X)
    log.residual_stored(B, X)
    log.residual_stored(B._replace(semantics="residual"), X)
    log.residual_evicted(A, X)
    log.residual_evicted(A, Y)
    assert log.take() == (
        ResidualStored(DIGEST_A, "eager", (X,)),
        ResidualStored(DIGEST_B, "eager", (X,)),
        ResidualStored(DIGEST_B, "residual", (X,)),
        ResidualEvicted(DIGEST_A, "eager", (X, Y)),
    )


def test_what_was_taken_is_not_told_again() -> None:
    log = EventLog()
    log.base_stored(X)
    log.take()
    assert log.take() == ()
    log.base_stored(Y)
    assert log.take() == (BaseStored((Y,)),)
