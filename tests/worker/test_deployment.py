from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from forkkv_cluster.core.config import ClusterConfig
from forkkv_cluster.core.errors import Internal, WorkerStopped
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.testing.fake_engine import FakeEngine
from forkkv_cluster.testing.in_memory_directory import InMemoryDirectory
from forkkv_cluster.testing.requests import adapter_ref, context_request, generate_request
from forkkv_cluster.worker.deployment import ForkKVWorker

PLANNER = adapter_ref("planner")


class Bench:
    def __init__(self) -> None:
        self.directory = InMemoryDirectory()
        self.engine = FakeEngine()
        self.worker = ForkKVWorker(ClusterConfig(), engine_factory=lambda config: (self.engine, "cpu"), sink=self.directory)

    @property
    def worker_id(self) -> str:
        return str(self.worker.record_replica_metadata()["worker_id"])

    async def until(self, condition) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110  # Publishing has no event that a test could wait for.
                await asyncio.sleep(0.001)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.worker.close()


async def test_chunks_carry_the_workers_id(bench: Bench) -> None:
    chunks = [chunk async for chunk in bench.worker.generate(generate_request([1, 2], max_tokens=2))]
    assert {chunk.worker_id for chunk in chunks} == {bench.worker_id}


async def test_a_released_hint_reaches_the_engine(bench: Bench) -> None:
    await bench.worker.release_hint("session-1")
    assert bench.engine.released_hints == ["session-1"]


async def test_a_context_pass_returns_its_terminal_chunk(bench: Bench) -> None:
    chunk = await bench.worker.run_context(context_request(range(5, 17)))
    assert chunk.usage is not None
    assert (chunk.usage.prefill_tokens_run, chunk.worker_id) == (12, bench.worker_id)


async def test_what_the_engine_caches_reaches_the_directory(bench: Bench) -> None:
    await bench.worker.load_adapter("planner", "dir")
    request = context_request(range(5, 17), declared=(PLANNER,))
    await bench.worker.run_context(request)
    chain = request.prefix.context

    def residual_blocks() -> int:
        wanted = {"residual_of": PLANNER.digest, "semantics": str(Sharing.EAGER), "adapter": PLANNER.digest}
        match = bench.directory.match(bench.worker_id, chain, **wanted)
        return match.residual_blocks if match.is_adapter_resident else 0

    await bench.until(lambda: residual_blocks() == 3)


async def test_a_directory_that_comes_back_empty_is_told_everything_again(bench: Bench) -> None:
    request = context_request(range(5, 17))
    await bench.worker.run_context(request)
    await bench.until(lambda: bench.directory.workers and len(bench.directory.workers[bench.worker_id].base) == 3)
    bench.directory.restart()
    await bench.worker.run_context(context_request(range(50, 62)))
    await bench.until(lambda: bench.directory.workers and len(bench.directory.workers[bench.worker_id].base) == 6)


async def test_events_wait_while_the_directory_is_away() -> None:
    bench = Bench()
    bench.worker._publisher._retry_s = 0.001
    bench.directory.is_away = True
    try:
        await bench.worker.run_context(context_request(range(5, 17)))
        bench.directory.is_away = False
        await bench.until(lambda: bench.directory.workers and len(bench.directory.workers[bench.worker_id].base) == 3)
    finally:
        bench.worker.close()


async def test_status_names_the_busy_requests(bench: Bench) -> None:
    stream = bench.worker.generate(generate_request([1, 2], max_tokens=10**6, request_id="long"))
    await anext(stream)
    assert (await bench.worker.status()).busy_request_ids == ("long",)
    await stream.aclose()
    await bench.until(lambda: not bench.worker._thread.request_ids)
    status = await bench.worker.status()
    assert (status.busy_request_ids, status.engine.num_running) == ((), 0)


async def test_routing_stats_do_not_change_while_the_worker_is_idle(bench: Bench) -> None:
    _ = [chunk async for chunk in bench.worker.generate(generate_request([1, 2], max_tokens=2))]
    first = bench.worker.record_routing_stats()
    await asyncio.sleep(0.02)
    assert bench.worker.record_routing_stats() == first
    assert (first["worker_id"], first["num_active"]) == (bench.worker_id, 0)


async def test_metadata_gives_the_bytes_of_a_block(bench: Bench) -> None:
    page_size = ClusterConfig().cache.page_size
    assert bench.worker.record_replica_metadata()["block_bytes"] == 256 * page_size


async def test_autoscaling_stats_are_plain_numbers(bench: Bench) -> None:
    assert bench.worker.record_autoscaling_stats() == {"queued_prefill_blocks": 0.0, "num_active": 0.0, "kv_used_fraction": 0.0}


async def test_a_failed_engine_makes_the_replica_unhealthy(bench: Bench) -> None:
    bench.worker.check_health()
    bench.engine.step_error = ZeroDivisionError("bad kernel")
    with pytest.raises(WorkerStopped):
        await bench.worker.run_context(context_request(range(5, 17)))
    with pytest.raises(Internal, match="bad kernel"):
        bench.worker.check_health()


async def test_each_life_of_a_worker_has_an_id_of_its_own() -> None:
    first, second = Bench(), Bench()
    assert first.worker_id != second.worker_id
    first.worker.close()
    second.worker.close()
