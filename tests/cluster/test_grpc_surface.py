"""What any gRPC client finds: health, reflection, adapters at run time, status."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ray.serve.generated import serve_pb2, serve_pb2_grpc
from safetensors.torch import load_file, save_file

from forkkv_cluster.app import RunningCluster
from forkkv_cluster.client import BranchSpec, ForkKVClient
from forkkv_cluster.core.errors import AlreadyExists, ForkKVError, InvalidArgument, NotFound
from forkkv_cluster.core.events import BaseStored, EventBatch
from forkkv_cluster.directory.actor import directory_name
from forkkv_cluster.directory.changes import Delta
from forkkv_cluster.directory.client import DirectoryClient
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.cluster.helpers import DOCUMENT, address_of_this_machine, eventually, workers

pytestmark = pytest.mark.cluster


@pytest.fixture
def channel(serve_cluster: RunningCluster) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(serve_cluster.grpc_address) as channel:
        yield channel


def test_the_standard_health_service_answers(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
    for service in ("", "forkkv_cluster.api.v1.SessionService"):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in answer.list_services_response.service}
    assert {f"forkkv_cluster.api.v1.{name}Service" for name in ("Session", "Adapter", "Cluster")} <= names
    assert "grpc.health.v1.Health" in names


def test_on_a_loopback_host_no_service_answers_other_machines(serve_cluster: RunningCluster) -> None:
    assert serve_cluster.config.server.host == "127.0.0.1"
    address = f"{address_of_this_machine()}:{serve_cluster.config.server.grpc_port}"
    with grpc.insecure_channel(address) as channel:
        listing = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        calls = [
            lambda: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()),  # type: ignore[no-untyped-call]
            lambda: list(listing.ServerReflectionInfo(asked)),
            lambda: serve_pb2_grpc.RayServeAPIServiceStub(channel).ListApplications(serve_pb2.ListApplicationsRequest()),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with ForkKVClient(address) as client, pytest.raises(ForkKVError, match="its own machine only"):
        client.generate(token_ids=[5, 6], max_tokens=2)


def test_an_adapter_is_loaded_used_and_unloaded_while_the_cluster_runs(client: ForkKVClient, tiny_kit: TinyKit) -> None:
    info = client.load_adapter("late", str(tiny_kit.adapter_dirs["judge"]))
    try:
        assert info.lora_rank == 16
        assert all("late" in {adapter.name for adapter in worker.engine.adapters} for worker in workers(client))
        assert client.load_adapter("late", str(tiny_kit.adapter_dirs["judge"])) == info
        with pytest.raises(AlreadyExists):
            client.load_adapter("late", str(tiny_kit.adapter_dirs["scout"]))
        with client.create_session(DOCUMENT, adapters=["late"]) as session:
            (branch,) = session.fork([BranchSpec("a", "late")])
            assert branch.generate("Go", max_tokens=3).token_ids
    finally:
        client.unload_adapter("late")
    assert "late" not in {adapter.name for adapter in client.list_adapters()}
    with pytest.raises(NotFound):
        client.generate("x", adapter="late")


def corrupt(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"not safetensors at all")


def integers(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)


def another_model(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    save_file({name: torch.cat([tensor, tensor], dim=-1) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [corrupt, integers, another_model, shutil.rmtree])
def test_a_bad_adapter_is_refused_and_left_nowhere(
    client: ForkKVClient, tiny_kit: TinyKit, tmp_path: Path, damage: object
) -> None:
    directory = tmp_path / "adapter"
    shutil.copytree(tiny_kit.adapter_dirs["planner"], directory)
    damage(directory)  # type: ignore[operator]
    with pytest.raises(InvalidArgument):
        client.load_adapter("bad", str(directory))
    assert "bad" not in {adapter.name for adapter in client.list_adapters()}
    assert all("bad" not in {adapter.name for adapter in worker.engine.adapters} for worker in workers(client))


def test_status_adds_up(client: ForkKVClient, serve_cluster: RunningCluster) -> None:
    status = client.status()
    assert status.model.name == serve_cluster.config.model.name
    assert status.model.dtype == "float32"
    assert len({worker.worker_id for worker in status.cluster.workers}) == 2
    for worker in status.cluster.workers:
        for pool in worker.engine.pools:
            assert pool.num_total == pool.num_free + pool.num_cached + pool.num_pinned


def test_the_directory_learns_of_shared_prefixes(client: ForkKVClient, serve_cluster: RunningCluster) -> None:
    document = "Words that no other test has in its document. " * 20
    directory = DirectoryClient(directory_name(serve_cluster.config.server.app_name), creates=False)

    def stored_since(mark: Delta) -> int:
        """Base blocks told of: their number in the status does not grow where others are evicted for them."""
        delta = asyncio.run(directory.deltas(mark.incarnation, mark.version, 0.0))
        batches = [change for change in delta.changes if isinstance(change, EventBatch)]
        return sum(len(event.hashes) for batch in batches for event in batch.events if isinstance(event, BaseStored))

    mark = asyncio.run(directory.deltas("", 0, 0.0))
    with client.create_session(document, adapters=["planner"]) as session:
        expected = session.info.num_context_tokens // 16
        eventually(lambda: stored_since(mark) >= expected, what="blocks in the directory", timeout_s=20.0)
