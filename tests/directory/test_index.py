from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from forkkv_cluster.core.events import (
    AdapterLoaded,
    AdapterUnloaded,
    BaseEvicted,
    BaseStored,
    CacheEvent,
    Cleared,
    EventBatch,
    ResidualEvicted,
    ResidualStored,
)
from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId
from forkkv_cluster.directory.index import DirectoryIndex
from forkkv_cluster.directory.mirror import DirectoryMirror
from forkkv_cluster.testing.in_memory_directory import InMemoryDirectory

W = WorkerId("w0")
PLANNER = AdapterDigest("planner")


def blocks(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(number.to_bytes(16, "big")) for number in numbers)


CHAIN = blocks(*range(8))


def batch(first_seq: int, *events: CacheEvent, epoch: int = 1, snapshot: bool = False, worker: WorkerId = W) -> EventBatch:
    return EventBatch(worker, epoch, first_seq, events, snapshot)


def base_len(index: DirectoryIndex, worker: WorkerId = W) -> int:
    return index.match(worker, CHAIN, residual_of=None, semantics="eager", adapter=None).base_blocks


@pytest.fixture
def index() -> DirectoryIndex:
    return DirectoryIndex("first")


def test_a_batch_that_follows_on_is_applied_and_answered_with_the_number_after_it(index: DirectoryIndex) -> None:
    assert index.apply(batch(0, BaseStored(CHAIN[:2]), BaseStored(CHAIN[2:4]))) == 2
    assert base_len(index) == 4


def test_a_repeated_batch_changes_nothing(index: DirectoryIndex) -> None:
    stored = batch(0, BaseStored(CHAIN[:2]))
    index.apply(stored)
    index.apply(batch(1, BaseEvicted(CHAIN[1:2])))
    assert index.apply(stored) == 2
    assert base_len(index) == 1
    assert index.version == 2


def test_an_overlapping_batch_adds_only_what_is_new(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN[:2])))
    assert index.apply(batch(0, BaseStored(CHAIN[:2]), BaseStored(CHAIN[2:3]))) == 2
    assert base_len(index) == 3


def test_a_gap_is_not_applied_and_is_answered_with_the_number_it_lacks(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN[:1])))
    assert index.apply(batch(3, BaseStored(CHAIN[1:4]))) == 1
    assert base_len(index) == 1


def test_a_snapshot_after_a_gap_replaces_all_that_was_known(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN), AdapterLoaded(PLANNER)))
    assert index.apply(batch(7, BaseStored(CHAIN[:3]), snapshot=True)) == 7
    match = index.match(W, CHAIN, residual_of=None, semantics="eager", adapter=PLANNER)
    assert (match.base_blocks, match.is_adapter_resident) == (3, False)
    assert index.apply(batch(7, BaseStored(CHAIN[3:5]))) == 8


def test_a_snapshot_that_arrives_late_is_ignored(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN[:1]), BaseStored(CHAIN[1:4])))
    assert index.apply(batch(1, BaseStored(CHAIN[:1]), snapshot=True)) == 2
    assert base_len(index) == 4


def test_a_new_epoch_drops_all_that_was_said_before(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN)))
    assert index.apply(batch(0, BaseStored(CHAIN[:1]), epoch=2)) == 1
    assert base_len(index) == 1


def test_an_older_epoch_is_ignored(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN[:1]), epoch=2))
    assert index.apply(batch(5, BaseStored(CHAIN), epoch=1)) == 6
    assert base_len(index) == 1


def test_an_empty_batch_of_an_unknown_worker_asks_for_a_snapshot(index: DirectoryIndex) -> None:
    assert index.apply(batch(9)) == 0


def test_base_eviction_takes_the_residuals_of_the_block_along(index: DirectoryIndex) -> None:
    index.apply(
        batch(0, BaseStored(CHAIN), ResidualStored(PLANNER, "eager", CHAIN), BaseEvicted(CHAIN[3:]), BaseStored(CHAIN[3:]))
    )
    match = index.match(W, CHAIN, residual_of=PLANNER, semantics="eager", adapter=None)
    assert (match.base_blocks, match.residual_blocks) == (8, 3)
    assert index.status().num_residual_blocks == 3


def test_the_two_residual_semantics_never_serve_each_other(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN), ResidualStored(PLANNER, "eager", CHAIN)))
    assert index.match(W, CHAIN, residual_of=PLANNER, semantics="residual", adapter=None).residual_blocks == 0


def test_a_residual_without_its_base_block_does_not_count(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN[:2]), ResidualStored(PLANNER, "eager", CHAIN[:4])))
    assert index.match(W, CHAIN, residual_of=PLANNER, semantics="eager", adapter=None).residual_blocks == 2


def test_a_request_that_needs_no_residual_has_its_base_match_for_one(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN[:5])))
    assert index.match(W, CHAIN, residual_of=None, semantics="eager", adapter=None).residual_blocks == 5


def test_an_unknown_worker_matches_nothing(index: DirectoryIndex) -> None:
    match = index.match(WorkerId("nobody"), CHAIN, residual_of=PLANNER, semantics="eager", adapter=PLANNER)
    assert (match.base_blocks, match.residual_blocks, match.is_adapter_resident) == (0, 0, False)


def test_a_dropped_worker_is_forgotten_and_its_next_batch_asks_for_a_snapshot(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN)))
    assert index.drop_worker(W)
    assert not index.drop_worker(W)
    assert base_len(index) == 0
    assert index.apply(batch(1, BaseStored(CHAIN))) == 0


def test_only_workers_silent_for_longer_than_the_lease_are_dropped(index: DirectoryIndex) -> None:
    other = WorkerId("w1")
    index.apply(batch(0, BaseStored(CHAIN)), now_s=0.0)
    index.apply(batch(0, BaseStored(CHAIN), worker=other), now_s=20.0)
    assert index.drop_silent(now_s=31.0, lease_s=30.0) == (W,)
    index.apply(batch(1, worker=other), now_s=49.0)
    assert index.drop_silent(now_s=60.0, lease_s=30.0) == ()


def test_deltas_hold_exactly_the_changes_since_a_version(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN[:1])))
    index.apply(batch(1, BaseStored(CHAIN[1:2])))
    delta = index.deltas("first", 1)
    assert (delta.since, delta.version, delta.is_snapshot) == (1, 2, False)
    assert delta.changes == (batch(1, BaseStored(CHAIN[1:2])),)


def test_another_incarnation_gets_a_snapshot(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN)))
    assert index.deltas("earlier", 1).is_snapshot


def test_a_version_from_the_future_gets_a_snapshot(index: DirectoryIndex) -> None:
    assert index.deltas("first", 5).is_snapshot


def test_who_is_behind_the_bounded_log_gets_a_snapshot() -> None:
    index = DirectoryIndex("first", max_log_hashes=6)
    for seq in range(4):
        index.apply(batch(seq, BaseStored(CHAIN[seq : seq + 1])))
    assert index.deltas("first", 0).is_snapshot
    assert len(index.deltas("first", 2).changes) == 2


def test_a_heartbeat_is_no_change(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN)))
    index.apply(batch(1))
    assert index.version == 1


def test_the_bit_of_an_adapter_without_blocks_is_used_again(index: DirectoryIndex) -> None:
    index.apply(batch(0, BaseStored(CHAIN)))
    for number in range(200):
        adapter = AdapterDigest(f"a{number}")
        index.apply(batch(1 + 2 * number, ResidualStored(adapter, "eager", CHAIN), ResidualEvicted(adapter, "eager", CHAIN)))
    index.apply(batch(401, ResidualStored(PLANNER, "eager", CHAIN[:3])))
    assert index.match(W, CHAIN, residual_of=PLANNER, semantics="eager", adapter=None).residual_blocks == 3
    assert index.match(W, CHAIN, residual_of=AdapterDigest("a199"), semantics="eager", adapter=None).residual_blocks == 0
    assert index.status().num_residual_blocks == 3


ADAPTERS = [AdapterDigest("a"), AdapterDigest("b")]
SEMANTICS = ["eager", "residual"]
CHAINS = [blocks(0, 1, 2, 3), blocks(0, 1, 10, 11), blocks(20, 21)]


class IndexAgainstNaiveModel(RuleBasedStateMachine):
    """Workers with leaf-first caches speak to the index, to a dict-of-sets model, and through a mirror."""

    def __init__(self) -> None:
        super().__init__()
        self.index = DirectoryIndex("first", max_log_hashes=25)
        self.model = InMemoryDirectory()
        self.mirror = DirectoryMirror(speculative_ttl_s=1.0)
        self.next_seq = {WorkerId("w0"): 0, WorkerId("w1"): 0}
        self.epoch = dict.fromkeys(self.next_seq, 1)
        self.sent: list[EventBatch] = []

    def say(self, worker: WorkerId, *events: CacheEvent) -> None:
        said = EventBatch(worker, self.epoch[worker], self.next_seq[worker], events)
        self.next_seq[worker] += len(events)
        self.deliver(said)

    def deliver(self, said: EventBatch) -> None:
        self.sent.append(said)
        assert self.index.apply(said) == self.model.apply_now(said)

    workers = st.sampled_from([WorkerId("w0"), WorkerId("w1")])
    chains = st.sampled_from(CHAINS)
    lengths = st.integers(0, 4)

    @rule(worker=workers, chain=chains, length=lengths)
    def store_base(self, worker: WorkerId, chain: tuple[BlockHash, ...], length: int) -> None:
        self.say(worker, BaseStored(chain[:length]))

    @rule(worker=workers, chain=chains, length=lengths)
    def evict_base(self, worker: WorkerId, chain: tuple[BlockHash, ...], length: int) -> None:
        # A block's children go with it, whichever chain they are on: what is held stays prefix-closed.
        gone = {block for other in CHAINS for i, block in enumerate(other) if set(chain[length:]) & set(other[: i + 1])}
        self.say(worker, BaseEvicted(tuple(sorted(gone))))

    @rule(worker=workers, chain=chains, length=lengths, adapter=st.sampled_from(ADAPTERS), kind=st.sampled_from(SEMANTICS))
    def store_residual(
        self, worker: WorkerId, chain: tuple[BlockHash, ...], length: int, adapter: AdapterDigest, kind: str
    ) -> None:
        self.say(worker, BaseStored(chain[:length]), ResidualStored(adapter, kind, chain[:length]))

    @rule(worker=workers, adapter=st.sampled_from(ADAPTERS), kind=st.sampled_from(SEMANTICS))
    def evict_residual(self, worker: WorkerId, adapter: AdapterDigest, kind: str) -> None:
        self.say(worker, ResidualEvicted(adapter, kind, tuple({block for chain in CHAINS for block in chain})))

    @rule(worker=workers, adapter=st.sampled_from(ADAPTERS), is_loaded=st.booleans())
    def change_adapter(self, worker: WorkerId, adapter: AdapterDigest, is_loaded: bool) -> None:
        self.say(worker, AdapterLoaded(adapter) if is_loaded else AdapterUnloaded(adapter))

    @rule(worker=workers)
    def clear(self, worker: WorkerId) -> None:
        self.say(worker, Cleared())

    @rule(worker=workers)
    def restart(self, worker: WorkerId) -> None:
        self.epoch[worker] += 1
        self.next_seq[worker] = 0

    @rule(worker=workers)
    def lose_events(self, worker: WorkerId) -> None:
        self.next_seq[worker] += 3

    @rule(worker=workers, chain=chains, length=lengths)
    def send_snapshot(self, worker: WorkerId, chain: tuple[BlockHash, ...], length: int) -> None:
        events = (AdapterLoaded(ADAPTERS[0]), BaseStored(chain[:length]), ResidualStored(ADAPTERS[0], "eager", chain[:length]))
        self.deliver(EventBatch(worker, self.epoch[worker], self.next_seq[worker], events, is_snapshot=True))

    @rule(which=st.integers(0, 1000))
    def repeat_an_old_batch(self, which: int) -> None:
        if self.sent:
            self.deliver(self.sent[which % len(self.sent)])

    @rule(worker=workers)
    def drop(self, worker: WorkerId) -> None:
        self.index.drop_worker(worker)
        self.model.drop_worker(worker)

    @rule()
    def mirror_follows(self) -> None:
        assert self.mirror.apply(self.index.deltas(self.mirror.incarnation, self.mirror.version))
        for worker in self.next_seq:
            self.check(self.mirror, worker)

    def check(self, view: DirectoryIndex | DirectoryMirror, worker: WorkerId) -> None:
        for chain in CHAINS:
            for adapter in (None, *ADAPTERS):
                for kind in SEMANTICS:
                    wanted = {"residual_of": adapter, "semantics": kind, "adapter": adapter}
                    assert view.match(worker, chain, **wanted) == self.model.match(worker, chain, **wanted)

    @invariant()
    def index_agrees_with_the_model(self) -> None:
        for worker in self.next_seq:
            self.check(self.index, worker)
        status = self.index.status()
        assert status.num_base_blocks == sum(len(record.base) for record in self.model.workers.values())
        residual = sum(len(held) for record in self.model.workers.values() for held in record.residual.values())
        assert status.num_residual_blocks == residual


TestIndexAgainstNaiveModel = IndexAgainstNaiveModel.TestCase
TestIndexAgainstNaiveModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
