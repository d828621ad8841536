from __future__ import annotations

import asyncio

import pytest

from forkkv_cluster.core.clock import SystemClock
from forkkv_cluster.core.errors import Cancelled
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.request import FinishReason, PrefixUsage, TokenChunk, TokenLogprob
from forkkv_cluster.worker.output_stream import OutputStream, merge_chunks

R = RequestId("r0")
LONG_S = 60.0


def chunk(*tokens: int, end: bool = False, usage: PrefixUsage | None = None) -> TokenChunk:
    return TokenChunk(R, tokens, finish_reason=FinishReason.LENGTH if end else None, usage=usage)


def test_merged_chunks_say_the_same_as_the_single_ones() -> None:
    usage = PrefixUsage(base_hit_tokens=4)
    first = TokenChunk(R, (1,), (TokenLogprob(1, -0.5),), usage=usage)
    last = TokenChunk(R, (2,), (TokenLogprob(2, -0.25),), finish_reason=FinishReason.STOP, matched_stop=2)
    merged = merge_chunks([first, last])
    assert merged.token_ids == (1, 2)
    assert [entry.token_id for entry in merged.logprobs] == [1, 2]
    assert (merged.finish_reason, merged.matched_stop, merged.usage) == (FinishReason.STOP, 2, usage)


async def test_the_first_chunk_goes_out_at_once() -> None:
    stream = OutputStream(SystemClock(), LONG_S)
    stream.put(chunk(1))
    assert (await asyncio.wait_for(stream.next_chunk(), 5)).token_ids == (1,)


async def test_later_chunks_are_held_back_and_come_together_with_the_end() -> None:
    stream = OutputStream(SystemClock(), LONG_S)
    stream.put(chunk(1))
    await stream.next_chunk()
    stream.put(chunk(2))
    waiting = asyncio.create_task(stream.next_chunk())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    stream.put(chunk(3, end=True))
    merged = await asyncio.wait_for(waiting, 5)
    assert (merged.token_ids, merged.finish_reason) == ((2, 3), FinishReason.LENGTH)


async def test_the_interval_lets_later_chunks_out() -> None:
    stream = OutputStream(SystemClock(), 0.01)
    stream.put(chunk(1))
    await stream.next_chunk()
    stream.put(chunk(2))
    assert (await asyncio.wait_for(stream.next_chunk(), 5)).token_ids == (2,)


async def test_an_error_comes_after_the_chunks_before_it_and_again_when_asked_again() -> None:
    stream = OutputStream(SystemClock(), LONG_S)
    stream.put(chunk(1))
    stream.fail(Cancelled("gone"))
    assert (await stream.next_chunk()).token_ids == (1,)
    for _ in range(2):
        with pytest.raises(Cancelled):
            await asyncio.wait_for(stream.next_chunk(), 5)
