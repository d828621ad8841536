from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.request_router import PendingRequest

from forkkv_cluster.core.config import ClusterConfig, RoutingConfig
from forkkv_cluster.core.errors import ForkKVError, InvalidArgument, Unavailable
from forkkv_cluster.core.request import ContextRequest, GenerateRequest, TokenChunk
from forkkv_cluster.core.status import DirectoryStatus
from forkkv_cluster.directory.client import DirectoryClient, directory_name, kill_directory
from forkkv_cluster.routing.request_router import router_config, work_request, worker_report
from forkkv_cluster.testing.requests import context_request, generate_request


def replica(**facts: Any) -> Any:
    known = {"routing_stats": {}, "replica_metadata": {}, "replica_id": SimpleNamespace(unique_id="serve-id"), **facts}
    return SimpleNamespace(**known)


def test_a_replica_without_stats_is_known_by_its_metadata() -> None:
    report = worker_report(replica(replica_metadata={"worker_id": "worker-1", "block_bytes": 512}))
    assert (report.worker_id, report.load.num_active, report.block_bytes) == ("worker-1", 0, 512)


def test_a_replica_that_has_said_nothing_yet_keeps_serves_own_id() -> None:
    assert worker_report(replica()).worker_id == "serve-id"


def test_stats_become_the_load() -> None:
    report = worker_report(replica(routing_stats={"worker_id": "worker-1", "num_active": 3, "free_bytes": 7, "other": 1}))
    assert (report.load.num_active, report.load.free_bytes) == (3, 7)


async def test_only_calls_with_a_prompt_are_placed() -> None:
    request = generate_request([1, 2])
    assert work_request(PendingRequest([request], {}, None)) is request
    assert work_request(PendingRequest(["planner", "dir"], {}, None)) is None
    assert work_request(PendingRequest([], {}, None)) is None
    assert work_request(None) is None


def test_the_routers_arguments_rebuild_its_configuration() -> None:
    config = ClusterConfig(routing=RoutingConfig(spill_blocks=3.0))
    kwargs = router_config(config, "directory").request_router_kwargs
    assert RoutingConfig.model_validate(kwargs["routing"]) == config.routing


DOCUMENT = list(range(5, 5 + 64))


class Cluster:
    """The calls that a gateway makes, from the test's process."""

    def __init__(self, workers: Any) -> None:
        self.app_name = workers.app_name
        self._handle = workers.handle

    async def run_context(self, request: ContextRequest) -> TokenChunk:
        return await self._handle.run_context.remote(request)

    async def generate(self, request: GenerateRequest) -> list[TokenChunk]:
        stream = self._handle.options(method_name="generate", stream=True).remote(request)
        return [chunk async for chunk in stream]

    def stream(self, request: GenerateRequest) -> Any:
        return self._handle.options(method_name="generate", stream=True).remote(request)

    async def statuses(self) -> list[Any]:
        return await self._handle.broadcast("status").results_async(timeout_s=30)

    async def directory_when(self, condition: Any, timeout_s: float = 30.0) -> DirectoryStatus:
        client = DirectoryClient(directory_name(self.app_name), creates=False)
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    status = await client.status()
                except Unavailable:
                    status = None
                if status is not None and condition(status):
                    return status
                await asyncio.sleep(0.05)


@pytest.fixture
def cluster(routed_workers: Any) -> Cluster:
    return Cluster(routed_workers)


def branch(own: int, document: list[int] = DOCUMENT, **options: Any) -> GenerateRequest:
    return generate_request([*document, own], context_len=len(document), max_tokens=3, **options)


@pytest.mark.cluster
async def test_branches_follow_their_context_and_the_directory_learns_of_it(cluster: Cluster) -> None:
    context = await cluster.run_context(context_request(DOCUMENT))
    outputs = [await cluster.generate(branch(number)) for number in range(4)]
    assert {chunk.worker_id for output in outputs for chunk in output} == {context.worker_id}
    assert [output[-1].usage.useful_hit_tokens for output in outputs] == [len(DOCUMENT)] * 4
    status = await cluster.directory_when(lambda status: status.num_base_blocks >= len(DOCUMENT) // 4)
    assert status.num_workers == 2


@pytest.mark.cluster
async def test_an_excluded_worker_gets_nothing_while_another_is_there(cluster: Cluster) -> None:
    home = (await cluster.run_context(context_request(DOCUMENT))).worker_id
    output = await cluster.generate(branch(7, excluded_workers=(home,)))
    assert output[-1].worker_id != home


@pytest.mark.cluster
async def test_a_workers_error_arrives_with_its_type(cluster: Cluster) -> None:
    with pytest.raises(Exception, match="max_model_len") as caught:
        await cluster.generate(generate_request([1] * 5000))
    cause = getattr(caught.value, "cause", caught.value)
    assert isinstance(cause, InvalidArgument)
    assert isinstance(cause, ForkKVError)


@pytest.mark.cluster
async def test_a_cancelled_stream_frees_the_worker(cluster: Cluster) -> None:
    stream = cluster.stream(generate_request(range(200, 220), max_tokens=10**6, request_id="endless"))
    await anext(aiter(stream))
    stream.cancel()
    async with asyncio.timeout(30):
        # Nothing to wait on: the worker is another process.
        while any("endless" in status.busy_request_ids for status in await cluster.statuses()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert sum(status.engine.counters.num_failed for status in await cluster.statuses()) >= 1


@pytest.mark.cluster
async def test_a_lost_directory_comes_back_and_is_told_everything_while_requests_go_on(cluster: Cluster) -> None:
    document = list(range(300, 300 + 64))
    context = await cluster.run_context(context_request(document))
    before = await cluster.directory_when(lambda status: status.num_base_blocks > 0)
    assert kill_directory(cluster.app_name)
    output = await cluster.generate(branch(99, document))
    assert output[-1].worker_id == context.worker_id
    after = await cluster.directory_when(
        lambda status: status.incarnation != before.incarnation and status.num_base_blocks >= before.num_base_blocks
    )
    assert after.num_workers >= 1


@pytest.mark.cluster
async def test_when_a_worker_is_killed_its_requests_go_to_another(cluster: Cluster) -> None:
    document = list(range(400, 400 + 64))
    home = (await cluster.run_context(context_request(document))).worker_id
    pids = {status.worker_id: status.pid for status in await cluster.statuses()}
    stream = cluster.stream(generate_request([*document, 1], context_len=len(document), max_tokens=10**6))
    victim = (await anext(aiter(stream))).worker_id
    assert victim == home
    os.kill(pids[victim], signal.SIGKILL)
    with pytest.raises(RayActorError):
        async for _ in stream:
            pass
    output = await cluster.generate(branch(1, document, excluded_workers=(victim,)))
    assert output[-1].worker_id != victim
    assert sum(len(chunk.token_ids) for chunk in output) == 3
