from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from forkkv_cluster.core.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    WorkerStopped,
)
from forkkv_cluster.core.events import CacheEvent
from forkkv_cluster.core.request import FinishReason, Sharing, TokenChunk
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.outputs import StepOutput
from forkkv_cluster.testing.fake_engine import FakeEngine, fake_token
from forkkv_cluster.testing.requests import adapter_ref, context_request, generate_request
from forkkv_cluster.worker.engine_thread import EngineThread


class GatedEngine(FakeEngine):
    """Takes a step only when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)

    def step(self) -> StepOutput:
        self.gate.acquire()
        return super().step()


class Harness:
    def __init__(self, engine: FakeEngine, flush_interval_s: float = 0.0) -> None:
        self.engine = engine
        self.events: list[tuple[int, tuple[CacheEvent, ...]]] = []
        self.thread = EngineThread(
            engine, flush_interval_s=flush_interval_s, on_events=lambda seq, events: self.events.append((seq, events))
        )
        self.thread.start()

    async def tokens(self, request) -> list[int]:
        return [token for chunk in await self.chunks(request) for token in chunk.token_ids]

    async def chunks(self, request) -> list[TokenChunk]:
        async with asyncio.timeout(10):
            return [chunk async for chunk in self.thread.generate(request)]

    async def until_idle(self, timeout_s: float = 10.0) -> None:
        for _ in range(int(timeout_s * 1000)):
            if not self.thread.request_ids:
                return
            await asyncio.sleep(0.001)
        raise TimeoutError(f"{self.thread.request_ids} are still there after {timeout_s} s")


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    harness = Harness(FakeEngine())
    yield harness
    harness.thread.close()


@pytest.fixture
async def gated() -> AsyncIterator[Harness]:
    harness = Harness(GatedEngine())
    yield harness
    harness.engine.gate.release(1000)
    harness.thread.close()


async def test_a_request_streams_its_tokens_and_ends_once(harness: Harness) -> None:
    chunks = await harness.chunks(generate_request([7, 8, 9], max_tokens=3))
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    first = fake_token(9, 3, None)
    second = fake_token(first, 4, None)
    assert tokens == [first, second, fake_token(second, 5, None)]
    assert [chunk.finish_reason for chunk in chunks][-1] == FinishReason.LENGTH
    assert harness.thread.request_ids == ()


async def test_many_requests_run_at_once_and_keep_apart(harness: Harness) -> None:
    requests = [generate_request([number, 1], max_tokens=8) for number in range(10, 26)]
    outputs = await asyncio.gather(*(harness.tokens(request) for request in requests))
    alone = await asyncio.gather(*(harness.tokens(generate_request([n, 1], max_tokens=8)) for n in range(10, 26)))
    assert outputs == alone
    assert all(len(output) == 8 for output in outputs)


async def test_a_stream_resumed_elsewhere_goes_on_as_it_would_have(harness: Harness) -> None:
    whole = await harness.tokens(generate_request([1, 2, 3], max_tokens=6))
    rest = await harness.tokens(generate_request([1, 2, 3, *whole[:2]], max_tokens=6, num_resumed=2))
    assert whole[:2] + rest == whole


async def test_a_context_pass_ends_with_one_chunk_without_tokens(harness: Harness) -> None:
    chunks = await harness.chunks(context_request(range(5, 17)))
    assert [(chunk.token_ids, chunk.finish_reason) for chunk in chunks] == [((), FinishReason.STOP)]
    assert chunks[0].usage is not None
    assert chunks[0].usage.prefill_tokens_run == 12


async def test_a_refused_request_raises_the_engines_error_and_leaves_nothing(harness: Harness) -> None:
    with pytest.raises(NotFound, match="planner"):
        await harness.tokens(generate_request([1, 2], adapter=adapter_ref("planner")))
    with pytest.raises(InvalidArgument):
        await harness.tokens(generate_request([1] * 5000))
    assert harness.thread.request_ids == ()
    assert await harness.tokens(generate_request([1, 2], max_tokens=1)) != []


async def test_a_bug_while_queueing_fails_that_request_alone(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: object) -> None:
        raise KeyError("slot")

    with monkeypatch.context() as patch:
        patch.setattr(harness.engine, "add_request", broken)
        with pytest.raises(Internal, match="slot"):
            await harness.tokens(generate_request([1, 2]))
    assert len(await harness.tokens(generate_request([1, 2], max_tokens=2))) == 2
    harness.thread.check()


async def test_a_deadline_ends_the_stream_as_the_engine_says(harness: Harness) -> None:
    with pytest.raises(DeadlineExceeded):
        await harness.tokens(generate_request([1, 2], deadline_s=1.0))


async def test_the_same_id_cannot_run_twice_at_once(gated: Harness) -> None:
    first = gated.thread.generate(generate_request([1, 2], request_id="same"))
    started = asyncio.create_task(anext(first))
    await asyncio.sleep(0)
    with pytest.raises(AlreadyExists, match="same"):
        await gated.tokens(generate_request([1, 2], request_id="same"))
    gated.engine.gate.release(100)
    await started
    await first.aclose()


async def test_closing_a_stream_early_frees_the_request_in_the_engine(gated: Harness) -> None:
    stream = gated.thread.generate(generate_request([1, 2], max_tokens=1000))
    gated.engine.gate.release()
    await anext(stream)
    await stream.aclose()
    assert len(gated.thread.request_ids) == 1, "it holds pages until the engine has let go"
    gated.engine.gate.release(100)
    await gated.until_idle()
    status = await gated.thread.call(lambda engine: engine.status())
    assert status.num_running == 0
    assert status.counters.num_failed == 1
    assert gated.thread.request_ids == ()


async def test_cancelling_the_consumer_frees_the_request_in_the_engine(gated: Harness) -> None:
    consumer = asyncio.create_task(gated.tokens(generate_request([1, 2], max_tokens=1000)))
    gated.engine.gate.release()
    await asyncio.sleep(0)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    gated.engine.gate.release(100)
    # The engine says that it has let go with the step after the cancellation, and a call runs before that step.
    await gated.until_idle()
    status = await gated.thread.call(lambda engine: engine.status())
    assert status.num_running == 0


async def test_tokens_of_several_steps_travel_together_within_the_flush_interval() -> None:
    harness = Harness(FakeEngine(), flush_interval_s=60.0)
    try:
        chunks = await harness.chunks(generate_request([1, 2], max_tokens=50))
    finally:
        harness.thread.close()
    assert len(chunks) <= 2, "the first at once, the rest with the end"
    assert sum(len(chunk.token_ids) for chunk in chunks) == 50


async def test_events_are_numbered_without_gaps(harness: Harness) -> None:
    await harness.thread.call(lambda engine: engine.load_adapter("planner", "dir"))
    await harness.tokens(generate_request(range(5, 21), max_tokens=1))
    await harness.tokens(generate_request(range(50, 66), max_tokens=1))
    position = 0
    for first_seq, events in harness.events:
        assert first_seq == position
        position += len(events)
    assert position >= 3


async def test_a_snapshot_is_numbered_after_the_events_that_it_covers(harness: Harness) -> None:
    await harness.tokens(generate_request(range(5, 21), max_tokens=1))
    number, events = await harness.thread.snapshot()
    assert number == sum(len(said) for _, said in harness.events) > 0
    assert [block for event in events for block in event.hashes] == list(generate_request(range(5, 21)).prefix.all_hashes)


async def test_a_call_hands_back_the_result_or_the_exception(harness: Harness) -> None:
    info = await harness.thread.call(lambda engine: engine.load_adapter("planner", "dir"))
    assert info.name == "planner"
    with pytest.raises(AlreadyExists):
        await harness.thread.call(lambda engine: engine.load_adapter("planner", "dir"))


async def test_requests_run_while_an_adapter_is_read(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, read = threading.Event(), harness.engine.read_adapter

    def slow_read(name: str, path: str, sharing: Sharing | None = None) -> Weights:
        assert may_end.wait(10)
        return read(name, path)

    monkeypatch.setattr(harness.engine, "read_adapter", slow_read)
    loading = asyncio.create_task(harness.thread.load_adapter("planner", "dir"))
    assert len(await harness.tokens(generate_request([7, 8], max_tokens=3))) == 3
    assert not loading.done()
    may_end.set()
    assert (await loading).name == "planner"


async def test_a_failed_step_fails_all_in_flight_and_the_worker_is_unhealthy(gated: Harness) -> None:
    running = [asyncio.create_task(gated.tokens(generate_request([n, 2], max_tokens=1000))) for n in range(3)]
    await asyncio.sleep(0)
    gated.engine.step_error = ZeroDivisionError("bad kernel")
    gated.engine.gate.release(100)
    results = await asyncio.gather(*running, return_exceptions=True)
    assert [(type(result), result.is_fault) for result in results] == [(WorkerStopped, True)] * 3
    with pytest.raises(Internal, match="bad kernel"):
        gated.thread.check()
    with pytest.raises(WorkerStopped) as refused:
        await gated.tokens(generate_request([1, 2]))
    assert not refused.value.is_fault
    assert gated.thread.request_ids == ()


async def test_a_call_that_waits_when_the_engine_fails_does_not_hang(gated: Harness) -> None:
    running = asyncio.create_task(gated.tokens(generate_request([1, 2], max_tokens=1000)))
    gated.engine.gate.release()
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(gated.thread.call(lambda engine: engine.status()))
    await asyncio.sleep(0)
    gated.engine.step_error = ZeroDivisionError("bad kernel")
    gated.engine.gate.release(100)
    with pytest.raises(WorkerStopped):
        await asyncio.wait_for(running, 10)
    with pytest.raises(WorkerStopped):
        await asyncio.wait_for(waiting, 10)


async def test_closing_fails_what_is_in_flight_as_unavailable(harness: Harness) -> None:
    stream = harness.thread.generate(generate_request([1, 2], max_tokens=10**6))
    await anext(stream)
    harness.thread.close()
    with pytest.raises(WorkerStopped) as ended:
        async for _ in stream:
            pass
    assert not ended.value.is_fault
    with pytest.raises(Internal):
        harness.thread.check()
    harness.thread.close()


async def test_an_idle_engine_takes_no_steps(harness: Harness) -> None:
    await harness.tokens(generate_request([1, 2], max_tokens=2))
    before = harness.engine.num_steps
    await asyncio.sleep(0.02)
    assert harness.engine.num_steps == before
    assert harness.thread.load.num_active == 0
