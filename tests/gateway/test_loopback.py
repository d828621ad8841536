"""Other machines are refused call by call, on a real gRPC server that is bound to every interface."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from forkkv_cluster.gateway.loopback import is_local_peer, is_loopback_host, refuse_other_machines
from forkkv_cluster.gateway.proxy_services import servicer_functions
from tests.cluster.helpers import address_of_this_machine


@pytest.mark.parametrize(
    ("peer", "is_local"),
    [
        ("ipv4:127.0.0.1:5000", True),
        ("ipv4:127.8.0.1:5000", True),
        ("ipv6:%5B::1%5D:5000", True),
        ("ipv6:[::ffff:127.0.0.1]:5000", True),
        ("unix:", True),
        ("ipv4:192.0.2.2:5000", False),
        ("ipv6:%5B::ffff:192.0.2.2%5D:5000", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", False),
        ("ipv4:127.0.0.1.example:5000", False),
        ("", False),
    ],
)
def test_a_peer_is_local_only_on_a_loopback_address(peer: str, is_local: bool) -> None:
    assert is_local_peer(peer) is is_local


def test_the_host_decides_whom_the_proxy_serves() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert is_loopback_host(host)
        assert servicer_functions(host) == ["forkkv_cluster.gateway.proxy_services.add_services_for_this_machine"]
    for host in ("0.0.0.0", "::", "192.0.2.2", "forkkv.example"):
        assert not is_loopback_host(host)
        assert servicer_functions(host) == ["forkkv_cluster.gateway.proxy_services.add_services_to_server"]


class Health(health_pb2_grpc.HealthServicer):
    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802 (rpc's name)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[health_pb2.HealthCheckResponse]:  # noqa: N802
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def guarded_server() -> AsyncIterator[int]:
    server = grpc.aio.server()
    refuse_other_machines(server)
    port = server.add_insecure_port("[::]:0")
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)  # type: ignore[no-untyped-call]
    reflection.enable_server_reflection([reflection.SERVICE_NAME], server)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def ask_all(address: str) -> list[grpc.StatusCode]:
    """Of a unary call, a server stream and reflection's stream in both directions."""
    request = health_pb2.HealthCheckRequest()
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        listing = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
        unary = health.Check(request, timeout=10)
        streams = [health.Watch(request, timeout=10), listing.ServerReflectionInfo(iter(asked), timeout=10)]
        return [await unary.code(), *[await code_at_the_end(stream) for stream in streams]]


async def code_at_the_end(stream: Any) -> grpc.StatusCode:
    """A stream has a status once its messages are read."""
    try:
        async for _ in stream:
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_this_machine_is_served() -> None:
    async with guarded_server() as port:
        assert await ask_all(f"127.0.0.1:{port}") == [grpc.StatusCode.OK] * 3


async def test_an_address_that_others_can_reach_is_refused_for_every_kind_of_call() -> None:
    async with guarded_server() as port:
        assert await ask_all(f"{address_of_this_machine()}:{port}") == [grpc.StatusCode.PERMISSION_DENIED] * 3
