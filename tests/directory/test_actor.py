from __future__ import annotations

import asyncio

import pytest

from forkkv_cluster.core.errors import Unavailable
from forkkv_cluster.core.events import BaseStored, EventBatch
from forkkv_cluster.core.ids import BlockHash, WorkerId
from forkkv_cluster.directory.actor import DirectoryActor
from forkkv_cluster.directory.changes import Delta
from forkkv_cluster.directory.client import follow
from forkkv_cluster.directory.mirror import DirectoryMirror
from forkkv_cluster.testing.manual_clock import ManualClock

W = WorkerId("w0")
CHAIN = tuple(BlockHash(bytes([i]) * 16) for i in range(4))


def stored(first_seq: int, length: int) -> EventBatch:
    return EventBatch(W, 1, first_seq, (BaseStored(CHAIN[:length]),))


async def test_a_long_poll_returns_as_soon_as_something_changes() -> None:
    actor = DirectoryActor()
    first = await actor.deltas("", 0, timeout_s=0)
    poll = asyncio.create_task(actor.deltas(first.incarnation, first.version, timeout_s=60))
    await asyncio.sleep(0)
    assert not poll.done()
    await actor.apply(stored(0, 2))
    delta = await asyncio.wait_for(poll, 5)
    assert [change.events for change in delta.changes if isinstance(change, EventBatch)] == [(BaseStored(CHAIN[:2]),)]


async def test_a_long_poll_without_news_answers_empty_after_its_timeout() -> None:
    actor = DirectoryActor()
    first = await actor.deltas("", 0, timeout_s=0)
    delta = await actor.deltas(first.incarnation, first.version, timeout_s=0.01)
    assert (delta.changes, delta.is_snapshot) == ((), False)


async def test_an_unknown_incarnation_is_answered_at_once_with_a_snapshot() -> None:
    actor = DirectoryActor()
    await actor.apply(stored(0, 2))
    delta = await asyncio.wait_for(actor.deltas("lost", 17, timeout_s=60), 5)
    assert delta.is_snapshot


async def test_two_actors_have_different_incarnations() -> None:
    assert (await DirectoryActor().status()).incarnation != (await DirectoryActor().status()).incarnation


async def test_a_worker_silent_beyond_the_lease_is_gone() -> None:
    clock = ManualClock()
    actor = DirectoryActor(lease_s=30.0, clock=clock)
    await actor.apply(stored(0, 2))
    clock.advance(29)
    assert (await actor.status()).num_workers == 1
    clock.advance(2)
    assert (await actor.status()).num_workers == 0


class FlakySource:
    """A plain actor that can go away, and come back empty."""

    def __init__(self) -> None:
        self.actor = DirectoryActor()
        self.is_away = False
        self.num_refused = 0
        self.refused = asyncio.Event()

    async def deltas(self, incarnation: str, version: int, timeout_s: float) -> Delta:
        if self.is_away:
            self.num_refused += 1
            self.refused.set()
            raise Unavailable("away")
        return await self.actor.deltas(incarnation, version, 0.01)


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # Nothing to wait on: the follower is private.
            await asyncio.sleep(0.001)


@pytest.fixture
async def followed():
    mirror, source = DirectoryMirror(5.0), FlakySource()
    task = asyncio.create_task(follow(mirror, source, min_interval_s=0.0, retry_s=0.001))
    yield mirror, source
    task.cancel()


def base_len(mirror: DirectoryMirror) -> int:
    return mirror.match(W, CHAIN, residual_of=None, semantics="eager", adapter=None).base_blocks


async def test_a_follower_brings_the_mirror_up_to_date(followed: tuple[DirectoryMirror, FlakySource]) -> None:
    mirror, source = followed
    await source.actor.apply(stored(0, 3))
    await until(lambda: base_len(mirror) == 3)


async def test_the_mirror_stays_as_it_was_while_the_directory_is_away(followed: tuple[DirectoryMirror, FlakySource]) -> None:
    mirror, source = followed
    await source.actor.apply(stored(0, 3))
    await until(lambda: base_len(mirror) == 3)
    source.is_away = True
    await asyncio.wait_for(source.refused.wait(), 5)
    assert base_len(mirror) == 3


async def test_a_directory_that_came_back_empty_is_followed_again(followed: tuple[DirectoryMirror, FlakySource]) -> None:
    mirror, source = followed
    await source.actor.apply(stored(0, 3))
    await until(lambda: base_len(mirror) == 3)
    source.is_away = True
    await asyncio.wait_for(source.refused.wait(), 5)
    source.actor, source.is_away = DirectoryActor(), False
    await until(lambda: base_len(mirror) == 0)
    await source.actor.apply(stored(0, 2))
    await until(lambda: base_len(mirror) == 2)
