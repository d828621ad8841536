"""The worker around the real engine and the tiny model: what its events say is what its cache then serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from forkkv_cluster.core.config import AdapterConfig, CacheConfig, ClusterConfig, DefaultsConfig, ModelConfig
from forkkv_cluster.core.ids import WorkerId
from forkkv_cluster.core.request import AdapterRef, Sharing
from forkkv_cluster.routing.placement_request import placement_request
from forkkv_cluster.testing.in_memory_directory import InMemoryDirectory
from forkkv_cluster.testing.requests import context_request, generate_request
from forkkv_cluster.worker.deployment import ForkKVWorker

DOCUMENT = [5 + number % 300 for number in range(128)]
PAGE_SIZE = 16


@pytest.fixture
async def directory() -> InMemoryDirectory:
    return InMemoryDirectory()


@pytest.fixture
async def worker(
    tiny_model_dir: Path, tiny_adapter_dirs: Mapping[str, Path], directory: InMemoryDirectory
) -> AsyncIterator[ForkKVWorker]:
    adapters = tuple(AdapterConfig(name=name, path=str(path)) for name, path in sorted(tiny_adapter_dirs.items())[:2])
    config = ClusterConfig(
        model=ModelConfig(path=str(tiny_model_dir), device="cpu"),
        adapters=adapters,
        cache=CacheConfig(kv_bytes=64 * 2**20, page_size=PAGE_SIZE),
        defaults=DefaultsConfig(adapter_sharing=Sharing.ISOLATED),  # what runs is what the tests ask for
    )
    worker = ForkKVWorker(config, sink=directory)
    yield worker
    worker.close()


async def test_the_directory_promises_what_the_cache_then_serves(worker: ForkKVWorker, directory: InMemoryDirectory) -> None:
    declared = tuple(AdapterRef(info.name, info.digest) for info in await worker.list_adapters())
    context = await worker.run_context(context_request(DOCUMENT, declared=declared, block_size=PAGE_SIZE))
    assert context.usage is not None
    assert context.usage.prefill_tokens_run == len(DOCUMENT)
    for number, adapter in enumerate(declared):
        tokens = [*DOCUMENT, 7 + number]
        turn = generate_request(
            tokens, context_len=len(DOCUMENT), adapter=adapter, declared=declared, max_tokens=5, block_size=PAGE_SIZE
        )
        wanted = placement_request(turn)
        async with asyncio.timeout(10):
            while True:
                match = directory.match(
                    WorkerId(context.worker_id),
                    wanted.context,
                    residual_of=wanted.residual_of,
                    semantics=wanted.semantics,
                    adapter=wanted.adapter,
                )
                if match.residual_blocks == len(wanted.context):
                    break
                await asyncio.sleep(0.005)
        assert match.is_adapter_resident
        chunks = [chunk async for chunk in worker.generate(turn)]
        assert sum(len(chunk.token_ids) for chunk in chunks) == 5
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.useful_hit_tokens == match.residual_blocks * PAGE_SIZE == len(DOCUMENT)


async def test_an_abandoned_stream_returns_what_it_held(worker: ForkKVWorker) -> None:
    before = (await worker.status()).engine
    stream = worker.generate(generate_request(DOCUMENT, max_tokens=300, block_size=PAGE_SIZE))
    await anext(stream)
    assert (await worker.status()).engine.num_running == 1
    await stream.aclose()
    async with asyncio.timeout(10):
        while (await worker.status()).busy_request_ids:  # noqa: ASYNC110  # The engine lets go in its own thread.
            await asyncio.sleep(0.005)
    after = (await worker.status()).engine
    assert (after.num_running, after.num_pinned_pages) == (before.num_running, before.num_pinned_pages) == (0, 0)
