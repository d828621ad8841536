"""Turns that outlive their connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from forkkv_cluster.core.errors import FailedPrecondition, Internal, ResourceExhausted
from forkkv_cluster.gateway.commands import TurnDelta, TurnEvent
from forkkv_cluster.gateway.turn_hub import TurnHub


class Source:
    """A turn of three events; each waits for ``gate`` when there is one."""

    def __init__(self, gate: asyncio.Semaphore | None = None, error: Exception | None = None) -> None:
        self.gate = gate
        self.error = error
        self.num_started = 0
        self.was_cancelled = False
        self.ended = asyncio.Event()

    async def events(self) -> AsyncGenerator[TurnEvent, None]:
        self.num_started += 1
        try:
            for token in range(3):
                if self.gate is not None:
                    await self.gate.acquire()
                if self.error is not None:
                    raise self.error
                yield TurnDelta((token,))
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        finally:
            self.ended.set()


def token_of(event: TurnEvent) -> int:
    assert isinstance(event, TurnDelta)
    return event.token_ids[0]


async def test_a_retry_gets_every_event_of_the_turn_that_runs() -> None:
    gate = asyncio.Semaphore(1)
    source, hub = Source(gate), TurnHub(10.0)
    first = hub.follow("key", "input", source.events)
    assert token_of(await anext(first)) == 0
    await first.aclose()
    gate.release()
    gate.release()
    assert [token_of(event) async for event in hub.follow("key", "input", source.events)] == [0, 1, 2]
    assert source.num_started == 1


async def test_an_error_that_nobody_meant_reaches_every_reader() -> None:
    gate = asyncio.Semaphore(0)
    source, hub = Source(gate, error=RuntimeError("a bug")), TurnHub(10.0)
    readers = [asyncio.ensure_future(anext(hub.follow("key", "input", source.events))) for _ in range(2)]
    await asyncio.sleep(0)
    gate.release()
    for reader in readers:
        with pytest.raises(Internal, match="RuntimeError: a bug"):
            await reader
    assert not hub.knows("key")


async def test_two_connections_read_one_turn() -> None:
    source, hub = Source(), TurnHub(10.0)

    async def read() -> list[int]:
        return [token_of(event) async for event in hub.follow("key", "input", source.events)]

    assert await asyncio.gather(read(), read()) == [[0, 1, 2], [0, 1, 2]]
    assert source.num_started == 1


async def test_a_turn_that_nobody_comes_back_for_is_cancelled() -> None:
    source, hub = Source(asyncio.Semaphore(1)), TurnHub(0.01)
    reader = hub.follow("key", "input", source.events)
    await anext(reader)
    await reader.aclose()
    await asyncio.wait_for(source.ended.wait(), 5)
    assert source.was_cancelled
    assert not hub.knows("key")


async def test_an_ended_turn_is_kept_for_a_while_only() -> None:
    source, hub = Source(), TurnHub(0.01)
    assert len([event async for event in hub.follow("key", "input", source.events)]) == 3
    assert hub.knows("key")
    async with asyncio.timeout(5):
        while hub.knows("key"):  # noqa: ASYNC110 (the hub tells nobody that it forgot)
            await asyncio.sleep(0.005)


async def test_a_failed_turn_starts_anew() -> None:
    source, hub = Source(error=ResourceExhausted("full", 1.0)), TurnHub(10.0)
    with pytest.raises(ResourceExhausted):
        await anext(hub.follow("key", "input", source.events))
    source.error = None
    assert len([event async for event in hub.follow("key", "input", source.events)]) == 3
    assert source.num_started == 2


async def test_a_turn_id_cannot_be_used_for_another_input() -> None:
    source, hub = Source(asyncio.Semaphore(1)), TurnHub(10.0)
    reader = hub.follow("key", "input", source.events)
    await anext(reader)
    with pytest.raises(FailedPrecondition, match="another input"):
        await anext(hub.follow("key", "other", source.events))
    await reader.aclose()
