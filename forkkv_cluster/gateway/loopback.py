"""A gRPC server that serves this machine alone, whatever it is bound to.

Ray Serve 2.60 binds its gRPC proxy to every interface; only its HTTP proxy takes a host. The port is bound before
``grpc_servicer_functions`` see the server, so the peers of other machines are refused call by call: with
PERMISSION_DENIED, before any handler, ours, Serve's own or reflection's, runs.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import grpc

_REFUSAL = "This server serves its own machine only. Set server.host to serve others, or connect from there."


def is_loopback_host(host: str) -> bool:
    """True for ``localhost`` and the addresses of 127.0.0.0/8 and ::1."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_local_peer(peer: str) -> bool:
    """``ServicerContext.peer()``: ``ipv4:127.0.0.1:5000``, ``ipv6:%5B::1%5D:5000`` and ``unix:`` sockets are local."""
    kind, _, rest = peer.partition(":")
    if kind == "unix":
        return True
    return kind in ("ipv4", "ipv6") and is_loopback_host(unquote(rest).rpartition(":")[0].strip("[]"))


def refuse_other_machines(server: Any) -> None:
    """Guard every method of a ``grpc.aio`` server: those it has, where it lists them as Serve's does, and all to come."""
    for handlers in getattr(server, "generic_rpc_handlers", ()):
        # Serve's own API service, which was added first; Serve replaces its handlers in the same way.
        handlers[0]._method_handlers = _all_guarded(handlers[0]._method_handlers)
    server._server = _GuardedServer(server._server)


class _GuardedServer:
    """grpcio's core server behind a ``grpc.aio.Server``: the one place that every method handler goes through."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers([_GuardedHandlers(handler) for handler in handlers])

    def add_registered_method_handlers(self, handlers: Mapping[str, Any]) -> None:
        self._server.add_registered_method_handlers(_all_guarded(handlers))


class _GuardedHandlers(grpc.GenericRpcHandler):
    def __init__(self, handlers: grpc.GenericRpcHandler) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        found = self._handlers.service(handler_call_details)
        return None if found is None else _guarded(found)


def _all_guarded(handlers: Mapping[str, Any]) -> dict[str, Any]:
    return {method: _guarded(handler) for method, handler in handlers.items()}


def _guarded(handler: Any) -> Any:
    """A ``grpc.RpcMethodHandler`` whose four kinds of behaviour, where it has them, ask for the peer first."""
    changes = {
        kind: wrap(behavior)
        for kind, wrap in (
            ("unary_unary", _guarded_unary),
            ("stream_unary", _guarded_unary),
            ("unary_stream", _guarded_stream),
            ("stream_stream", _guarded_stream),
        )
        if (behavior := getattr(handler, kind)) is not None
    }
    return handler._replace(**changes)


def _guarded_unary(behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    async def unary(request: Any, context: Any) -> Any:
        await _check_peer(context)
        return await behavior(request, context)

    return unary


def _guarded_stream(behavior: Callable[[Any, Any], AsyncGenerator[Any, None]]) -> Callable[[Any, Any], Any]:
    async def stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        await _check_peer(context)
        async for message in behavior(request, context):
            yield message

    return stream


async def _check_peer(context: Any) -> None:
    if not is_local_peer(context.peer()):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, _REFUSAL)
