"""Our services on Serve's gRPC proxy, with streams that end when their client does.

Serve 2.60 loses a client's cancellation that arrives while a message is being written: gRPC then cancels the write, not the
generator behind it, and Serve's generator takes the close that follows for a finished request. One in twenty streams that
were cancelled early went on to their last token [measured on two cores]. So here a task of its own reads Serve's stream: it
always waits inside Serve's code, where a cancellation counts, and the call's end cancels it.

Serve imports this module in its proxy processes, through ``grpc_servicer_functions``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeAlias

from grpc_health.v1 import health_pb2_grpc

from forkkv_cluster.api.v1 import adapters_pb2_grpc, cluster_pb2_grpc, sessions_pb2_grpc
from forkkv_cluster.gateway.loopback import is_loopback_host, refuse_other_machines

StreamHandler: TypeAlias = Callable[[Any, Any], AsyncGenerator[Any, None]]
_END = object()


def servicer_functions(host: str) -> list[str]:
    """Import paths for Serve's ``grpc_servicer_functions``: the name of the function tells the proxy whom to serve."""
    function = add_services_for_this_machine if is_loopback_host(host) else add_services_to_server
    return [f"{__name__}.{function.__name__}"]


def add_services_for_this_machine(servicer: Any, server: Any) -> None:
    """``add_services_to_server``, and nothing on ``server`` answers other machines: for a loopback ``server.host``."""
    refuse_other_machines(server)
    add_services_to_server(servicer, server)


def add_services_to_server(servicer: Any, server: Any) -> None:
    """Add every service that ``AgentGateway`` implements. ``server`` is Serve's gRPC server, or any other."""
    factory = getattr(server, "service_handler_factory", None)
    if factory is not None:
        server.service_handler_factory = _with_ending_streams(factory)
    add_functions: tuple[Callable[[Any, Any], None], ...] = (
        sessions_pb2_grpc.add_SessionServiceServicer_to_server,
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server,
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server,
        health_pb2_grpc.add_HealthServicer_to_server,
    )
    for add in add_functions:
        add(servicer, server)


def _with_ending_streams(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Serve's factory of rpc handlers, with its server streams wrapped; it makes one for each kind of rpc."""

    def make(*, service_method: str, streaming_type: Any) -> Any:
        handler = factory(service_method=service_method, streaming_type=streaming_type)
        return ending_with_its_call(handler) if streaming_type.name == "UNARY_STREAM" else handler

    return make


def ending_with_its_call(handler: StreamHandler) -> StreamHandler:
    """``handler`` read by a task that is cancelled when the call ends, however it ends."""

    async def stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        # Without a bound: whoever waited here for room would not be inside the handler when the cancellation comes.
        messages: asyncio.Queue[Any] = asyncio.Queue()
        kept = KeptContext(context)
        reader = asyncio.create_task(_read(handler(request, kept), messages))
        context.add_done_callback(lambda *_: reader.cancel())
        while (message := await messages.get()) is not _END:
            yield message
        await reader
        kept.apply_to(context)

    return stream


async def _read(source: AsyncGenerator[Any, None], messages: asyncio.Queue[Any]) -> None:
    try:
        async for message in source:
            messages.put_nowait(message)
    finally:
        messages.put_nowait(_END)


class KeptContext:
    """What a handler may ask of its call's context, and tell it, after the call is gone.

    grpcio's own context must not be touched then: it reads freed memory. The methods are those of ``grpc.aio.ServicerContext``
    that Serve uses; what is set reaches the call with ``apply_to``.
    """

    def __init__(self, context: Any) -> None:
        self._auth_context = context.auth_context()
        self._invocation_metadata = context.invocation_metadata()
        self._peer = context.peer()
        self._peer_identities = context.peer_identities()
        self._peer_identity_key = context.peer_identity_key()
        self._code = context.code()
        self._details = context.details()
        self._trailing_metadata = context.trailing_metadata()
        self._compression: Any = None

    def apply_to(self, context: Any) -> None:
        """Tell the real context, of a call that still lives."""
        if self._compression is not None:
            context.set_compression(self._compression)
        if self._trailing_metadata:
            context.set_trailing_metadata(self._trailing_metadata)
        if self._code:
            context.set_code(self._code)
        if self._details:
            context.set_details(self._details)

    def auth_context(self) -> Any:
        return self._auth_context

    def invocation_metadata(self) -> Any:
        return self._invocation_metadata

    def peer(self) -> Any:
        return self._peer

    def peer_identities(self) -> Any:
        return self._peer_identities

    def peer_identity_key(self) -> Any:
        return self._peer_identity_key

    def code(self) -> Any:
        return self._code

    def details(self) -> Any:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing_metadata

    def set_code(self, code: Any) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._trailing_metadata = trailing_metadata

    def set_compression(self, compression: Any) -> None:
        self._compression = compression
