"""Streams that end with their call, on a real gRPC server without Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from forkkv_cluster.gateway.proxy_services import add_services_to_server, ending_with_its_call

METHOD = "/test.Service/Stream"


@asynccontextmanager
async def served(handler: Callable[[Any, Any], AsyncGenerator[bytes, None]]) -> AsyncIterator[Callable[..., Any]]:
    """The handler behind a server and a channel; bytes in, bytes out."""
    server = grpc.aio.server()
    rpc = grpc.unary_stream_rpc_method_handler(ending_with_its_call(handler))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"Stream": rpc}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel.unary_stream(METHOD)
    finally:
        await server.stop(None)


async def test_messages_status_and_metadata_pass() -> None:
    async def handler(request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
        assert ("key", "value") in [tuple(pair) for pair in context.invocation_metadata()]
        yield request
        yield b"two"
        context.set_code(grpc.StatusCode.ABORTED)
        context.set_details("lost a race")
        context.set_trailing_metadata([("detail-bin", b"\x00\x01")])

    async with served(handler) as stub:
        call = stub(b"one", metadata=(("key", "value"),))
        assert [await call.read(), await call.read()] == [b"one", b"two"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.ABORTED, "lost a race")
    assert dict(caught.value.trailing_metadata() or ())["detail-bin"] == b"\x00\x01"


async def test_a_stream_that_ends_well_is_ok() -> None:
    async def handler(request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
        yield request

    async with served(handler) as stub:
        assert [message async for message in stub(b"one")] == [b"one"]


async def test_an_exception_of_the_handler_ends_the_call() -> None:
    async def handler(request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
        yield request
        raise RuntimeError("broken")

    async with served(handler) as stub:
        call = stub(b"one")
        assert await call.read() == b"one"
        with pytest.raises(grpc.aio.AioRpcError, match="broken"):
            await call.read()


async def test_a_client_that_leaves_between_two_messages_cancels_the_handler_where_it_waits() -> None:
    ended: asyncio.Queue[BaseException | None] = asyncio.Queue()

    async def handler(request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield request
                await asyncio.sleep(0.001)
        except BaseException as error:
            # As Serve does, ask the context once more: the call is gone by now.
            context.peer()
            context.set_code(grpc.StatusCode.CANCELLED)
            ended.put_nowait(error)
            raise

    async with served(handler) as stub:
        for _ in range(20):
            call = stub(b"one")
            await call.read()
            call.cancel()
            assert isinstance(await asyncio.wait_for(ended.get(), 5), asyncio.CancelledError)


async def test_every_service_is_added_to_a_plain_server_too() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.services: set[str] = set()

        def add_generic_rpc_handlers(self, handlers: Any) -> None:
            self.services.update(handler.service_name() for handler in handlers)

        def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
            self.services.add(service)

    class Anything:
        def __getattr__(self, name: str) -> None:
            return None

    recorder = Recorder()
    add_services_to_server(Anything(), recorder)
    assert recorder.services == {
        "forkkv_cluster.api.v1.SessionService",
        "forkkv_cluster.api.v1.AdapterService",
        "forkkv_cluster.api.v1.ClusterService",
        "grpc.health.v1.Health",
    }
