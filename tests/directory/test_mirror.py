from __future__ import annotations

import pytest

from forkkv_cluster.core.events import BaseStored, EventBatch, ResidualStored
from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId
from forkkv_cluster.core.placement import PrefixMatch
from forkkv_cluster.directory.changes import Delta
from forkkv_cluster.directory.index import DirectoryIndex
from forkkv_cluster.directory.mirror import DirectoryMirror
from forkkv_cluster.testing.manual_clock import ManualClock

W = WorkerId("w0")
PLANNER = AdapterDigest("planner")
CHAIN = tuple(BlockHash(bytes([i]) * 16) for i in range(6))
TTL_S = 5.0


def base_len(mirror: DirectoryMirror, worker: WorkerId = W) -> int:
    return mirror.match(worker, CHAIN, residual_of=None, semantics="eager", adapter=None).base_blocks


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def mirror(clock: ManualClock) -> DirectoryMirror:
    return DirectoryMirror(TTL_S, clock)


@pytest.fixture
def index() -> DirectoryIndex:
    index = DirectoryIndex("first")
    index.apply(EventBatch(W, 1, 0, (BaseStored(CHAIN[:2]),)))
    return index


def test_an_empty_mirror_matches_nothing(mirror: DirectoryMirror) -> None:
    assert mirror.match(W, CHAIN, residual_of=None, semantics="eager", adapter=None) == PrefixMatch(0, 0, True)


def test_it_follows_deltas_from_its_own_version(mirror: DirectoryMirror, index: DirectoryIndex) -> None:
    mirror.apply(index.deltas(mirror.incarnation, mirror.version))
    index.apply(EventBatch(W, 1, 1, (BaseStored(CHAIN[2:4]),)))
    assert base_len(mirror) == 2
    mirror.apply(index.deltas(mirror.incarnation, mirror.version))
    assert (base_len(mirror), mirror.version) == (4, 2)


def test_a_delta_that_does_not_continue_is_refused(mirror: DirectoryMirror, index: DirectoryIndex) -> None:
    mirror.apply(index.snapshot())
    assert not mirror.apply(Delta("first", 7, 8, ()))
    assert not mirror.apply(Delta("other", 1, 2, ()))
    assert mirror.version == 1


def test_a_snapshot_of_a_new_incarnation_replaces_everything(mirror: DirectoryMirror, index: DirectoryIndex) -> None:
    mirror.apply(index.snapshot())
    mirror.apply(DirectoryIndex("second").snapshot())
    assert (base_len(mirror), mirror.incarnation, mirror.worker_ids) == (0, "second", frozenset())


def test_what_was_just_routed_counts_while_it_runs(mirror: DirectoryMirror, clock: ManualClock) -> None:
    mirror.speculate("r0", W, CHAIN[:4])
    clock.advance(100 * TTL_S)
    assert base_len(mirror) == 4
    assert base_len(mirror, WorkerId("w1")) == 0


def test_it_counts_for_the_ttl_after_it_ended_and_no_longer(mirror: DirectoryMirror, clock: ManualClock) -> None:
    mirror.speculate("r0", W, CHAIN[:4])
    mirror.end_speculation("r0")
    clock.advance(TTL_S - 0.01)
    assert base_len(mirror) == 4
    clock.advance(0.02)
    assert base_len(mirror) == 0


def test_a_later_request_over_the_same_blocks_keeps_them_longer(mirror: DirectoryMirror, clock: ManualClock) -> None:
    mirror.speculate("r0", W, CHAIN[:4])
    mirror.end_speculation("r0")
    clock.advance(TTL_S / 2)
    mirror.speculate("r1", W, CHAIN[:3])
    mirror.end_speculation("r1")
    clock.advance(TTL_S * 0.75)
    mirror.speculate("r2", WorkerId("w1"), CHAIN[:1])
    assert base_len(mirror) == 3


def test_speculation_reaches_as_far_as_the_longer_of_known_and_routed(mirror: DirectoryMirror, index: DirectoryIndex) -> None:
    mirror.apply(index.snapshot())
    mirror.speculate("r0", W, CHAIN[:1])
    assert base_len(mirror) == 2
    mirror.speculate("r1", W, CHAIN[:5])
    assert base_len(mirror) == 5


def test_a_speculative_residual_serves_its_own_adapter_and_semantics_only(mirror: DirectoryMirror) -> None:
    mirror.speculate("r0", W, CHAIN[:4], [(PLANNER, "eager", CHAIN[:3])])

    def residual(adapter: str, semantics: str) -> int:
        wanted = AdapterDigest(adapter)
        return mirror.match(W, CHAIN, residual_of=wanted, semantics=semantics, adapter=None).residual_blocks

    assert (residual("planner", "eager"), residual("planner", "residual"), residual("critic", "eager")) == (3, 0, 0)


def test_known_residuals_and_a_speculative_base_do_not_add_up(mirror: DirectoryMirror, index: DirectoryIndex) -> None:
    index.apply(EventBatch(W, 1, 1, (ResidualStored(PLANNER, "eager", CHAIN[:2]),)))
    mirror.apply(index.snapshot())
    mirror.speculate("r0", W, CHAIN)
    match = mirror.match(W, CHAIN, residual_of=PLANNER, semantics="eager", adapter=None)
    assert (match.base_blocks, match.residual_blocks) == (6, 2)


def test_a_dead_worker_is_dropped_with_its_speculation(mirror: DirectoryMirror, index: DirectoryIndex) -> None:
    mirror.apply(index.snapshot())
    mirror.speculate("r0", W, CHAIN)
    mirror.drop_worker(W)
    assert base_len(mirror) == 0
    mirror.end_speculation("r0")
    assert base_len(mirror) == 0


def test_a_request_that_went_elsewhere_than_it_was_meant_to_leaves_nothing_there(mirror: DirectoryMirror) -> None:
    mirror.speculate("r0", W, CHAIN)
    mirror.end_speculation("r0")
    mirror.speculate("r0", WorkerId("w1"), CHAIN)
    assert (base_len(mirror), base_len(mirror, WorkerId("w1"))) == (0, len(CHAIN))


def test_a_replaced_entry_leaves_the_blocks_that_a_running_request_needs(mirror: DirectoryMirror) -> None:
    mirror.speculate("meant", W, CHAIN)
    mirror.end_speculation("meant")
    mirror.speculate("running", W, CHAIN[:2])
    mirror.speculate("meant", WorkerId("w1"), CHAIN)
    assert base_len(mirror) == 2


def test_expired_entries_leave_no_memory_behind(mirror: DirectoryMirror, clock: ManualClock) -> None:
    for number in range(50):
        mirror.speculate(f"r{number}", W, CHAIN, [(PLANNER, "eager", CHAIN)])
        mirror.end_speculation(f"r{number}")
    clock.advance(2 * TTL_S)
    mirror.end_speculation("unknown")
    mirror.speculate("last", WorkerId("w1"), ())
    assert len(mirror._speculation) == 1
    assert list(mirror._speculation._expiry) == [(WorkerId("w1"), None, "")]
