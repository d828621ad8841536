from __future__ import annotations

import pytest

from forkkv_cluster.core.events import BaseStored
from forkkv_cluster.core.ids import BlockHash, WorkerId
from forkkv_cluster.worker.event_sequencer import EventSequencer


def event(number: int) -> BaseStored:
    return BaseStored((BlockHash(bytes([number]) * 16),))


@pytest.fixture
def sequencer() -> EventSequencer:
    """Past its first snapshot."""
    sequencer = EventSequencer(WorkerId("w0"), 1)
    first = sequencer.take_snapshot(0, ())
    sequencer.acknowledged(first, 0)
    return sequencer


def test_it_begins_with_a_snapshot() -> None:
    assert EventSequencer(WorkerId("w0"), 1).needs_snapshot


def test_events_are_taken_in_order_with_their_numbers(sequencer: EventSequencer) -> None:
    sequencer.record(0, (event(0), event(1)))
    sequencer.record(2, (event(2),))
    batch = sequencer.take()
    assert (batch.first_seq, batch.events, batch.epoch) == (0, (event(0), event(1), event(2)), 1)


def test_what_is_not_acknowledged_is_sent_again_with_what_came_since(sequencer: EventSequencer) -> None:
    sequencer.record(0, (event(0),))
    sequencer.take()
    sequencer.record(1, (event(1),))
    assert sequencer.take().events == (event(0), event(1))


def test_what_is_acknowledged_is_not_sent_again(sequencer: EventSequencer) -> None:
    sequencer.record(0, (event(0),))
    batch = sequencer.take()
    sequencer.record(1, (event(1),))
    sequencer.acknowledged(batch, 1)
    assert (sequencer.take().first_seq, sequencer.take().events, sequencer.num_acknowledged) == (1, (event(1),), 1)


def test_without_events_the_batch_is_an_empty_sign_of_life(sequencer: EventSequencer) -> None:
    assert (sequencer.take().events, sequencer.has_pending) == ((), False)


def test_a_gap_at_the_directory_asks_for_a_snapshot_and_keeps_the_events(sequencer: EventSequencer) -> None:
    sequencer.record(0, (event(0), event(1)))
    sequencer.acknowledged(sequencer.take(), 0)
    assert sequencer.needs_snapshot
    assert sequencer.has_pending


def test_a_snapshot_covers_older_events_and_leaves_newer_ones(sequencer: EventSequencer) -> None:
    sequencer.record(0, (event(0), event(1), event(2)))
    snapshot = sequencer.take_snapshot(2, (event(0), event(1)))
    assert (snapshot.first_seq, snapshot.is_snapshot) == (2, True)
    sequencer.acknowledged(snapshot, 2)
    assert (sequencer.take().first_seq, sequencer.take().events) == (2, (event(2),))


def test_events_that_a_snapshot_covered_and_that_arrive_late_are_skipped(sequencer: EventSequencer) -> None:
    sequencer.acknowledged(sequencer.take_snapshot(3, ()), 3)
    sequencer.record(1, (event(1), event(2), event(3)))
    assert (sequencer.take().first_seq, sequencer.take().events) == (3, (event(3),))


def test_too_many_waiting_hashes_are_dropped_for_a_snapshot() -> None:
    sequencer = EventSequencer(WorkerId("w0"), 1, max_pending_hashes=5)
    sequencer.acknowledged(sequencer.take_snapshot(0, ()), 0)
    sequencer.record(0, (event(0), event(1), event(2)))
    assert (sequencer.needs_snapshot, sequencer.has_pending) == (True, False)
    sequencer.acknowledged(sequencer.take_snapshot(3, ()), 3)
    sequencer.record(3, (event(3),))
    assert sequencer.take().first_seq == 3


def test_unseen_numbers_ask_for_a_snapshot(sequencer: EventSequencer) -> None:
    sequencer.record(5, (event(5),))
    assert sequencer.needs_snapshot


def test_a_directory_that_lost_a_snapshot_is_sent_another(sequencer: EventSequencer) -> None:
    sequencer.acknowledged(sequencer.take_snapshot(4, ()), 0)
    assert sequencer.needs_snapshot
