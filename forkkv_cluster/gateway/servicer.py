"""The gRPC services as methods of one class: Serve calls the method that has the rpc's name.

An error never leaves a method as an exception, because Serve would drop its trailing metadata and log a traceback for
every mistake of a client: the status is set on the context instead, and a stream gets one last message with the error.
"""
# ruff: noqa: N802 (Serve finds a method by its rpc's name)

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2
from ray.serve.grpc_util import RayServegRPCContext

from forkkv_cluster.api.v1 import adapters_pb2, cluster_pb2, sessions_pb2
from forkkv_cluster.core.errors import ForkKVError, NotFound, unexpected
from forkkv_cluster.gateway import codec
from forkkv_cluster.gateway.identity import authenticate
from forkkv_cluster.gateway.service import GatewayService

logger = logging.getLogger(__name__)

ERROR_METADATA_KEY = "forkkv-error-bin"
_HEALTH_SERVICES = (
    "",
    "forkkv_cluster.api.v1.SessionService",
    "forkkv_cluster.api.v1.AdapterService",
    "forkkv_cluster.api.v1.ClusterService",
)

Response = TypeVar("Response")
Handler = Callable[[Any, Any, str | None], Awaitable[Response]]


def set_error(context: RayServegRPCContext, error: ForkKVError) -> None:
    """Status, message and the typed detail of ``error`` on the context."""
    context.set_code(grpc.StatusCode[error.code])
    context.set_details(error.message)
    detail: Any = codec.write_error(error).SerializeToString()  # Keys that end in -bin carry bytes.
    context.set_trailing_metadata([(ERROR_METADATA_KEY, detail)])


def as_forkkv_error(error: Exception) -> ForkKVError:
    """What the client sees of an exception that nobody meant to raise; the server's log has the traceback."""
    if isinstance(error, ForkKVError):
        return error
    logger.error("unexpected error in a gRPC method", exc_info=error)
    return unexpected(error)


def unary(empty: Callable[[], Response]) -> Callable[[Handler[Response]], Any]:
    """Make ``handler(self, request, caller)`` an rpc method: authenticated, its errors on the context.

    ``empty`` makes the message that goes with an error status.
    """

    def decorate(handler: Handler[Response]) -> Any:
        async def method(self: GrpcServicer, request: Any, grpc_context: RayServegRPCContext) -> Response:
            try:
                return await handler(self, request, self.caller(grpc_context))
            except Exception as error:
                set_error(grpc_context, as_forkkv_error(error))
                return empty()

        # Not functools.wraps: Serve reads the signature, and passes the context only where it is named.
        method.__name__, method.__doc__ = handler.__name__, handler.__doc__
        return method

    return decorate


class GrpcServicer:
    """SessionService, AdapterService, ClusterService and grpc.health.v1.Health over one ``GatewayService``."""

    service: GatewayService

    def caller(self, context: RayServegRPCContext) -> str | None:
        """The caller's tenant, None on an open server. Raises Unauthenticated."""
        authorization = dict(context.invocation_metadata()).get("authorization")
        return authenticate(self.service.config.gateway.api_tokens, authorization)

    @unary(sessions_pb2.Session)
    async def CreateSession(self, request: sessions_pb2.CreateSessionRequest, caller: str | None) -> sessions_pb2.Session:
        return codec.write_session(await self.service.create_session(caller, codec.read_create_session(request)))

    @unary(sessions_pb2.Session)
    async def GetSession(self, request: sessions_pb2.GetSessionRequest, caller: str | None) -> sessions_pb2.Session:
        session = await self.service.get_session(caller, request.session_id)
        return codec.write_session(session, include_tokens=request.include_tokens)

    @unary(sessions_pb2.ListSessionsResponse)
    async def ListSessions(
        self, request: sessions_pb2.ListSessionsRequest, caller: str | None
    ) -> sessions_pb2.ListSessionsResponse:
        sessions = await self.service.list_sessions(caller, request.tenant)
        return sessions_pb2.ListSessionsResponse(sessions=[codec.write_session(session) for session in sessions])

    @unary(sessions_pb2.CloseSessionResponse)
    async def CloseSession(
        self, request: sessions_pb2.CloseSessionRequest, caller: str | None
    ) -> sessions_pb2.CloseSessionResponse:
        await self.service.close_session(caller, request.session_id)
        return sessions_pb2.CloseSessionResponse()

    @unary(sessions_pb2.ForkResponse)
    async def Fork(self, request: sessions_pb2.ForkRequest, caller: str | None) -> sessions_pb2.ForkResponse:
        specs = codec.read_branch_specs(request)
        branches = await self.service.fork(caller, request.session_id, specs, request.parent or None)
        return sessions_pb2.ForkResponse(branches=[codec.write_branch(branch) for branch in branches])

    @unary(sessions_pb2.JoinResponse)
    async def Join(self, request: sessions_pb2.JoinRequest, caller: str | None) -> sessions_pb2.JoinResponse:
        what = codec.read_join_what(request.what)
        joined, session = await self.service.join(caller, request.session_id, request.branch, what)
        return sessions_pb2.JoinResponse(num_joined_tokens=joined, num_context_tokens=len(session.context))

    async def Generate(
        self, request: sessions_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[sessions_pb2.GenerateResponse, None]:
        try:
            events = self.service.generate(self.caller(grpc_context), codec.read_generate(request))
            async with aclosing(events):
                async for event in events:
                    yield codec.write_event(event)
        except Exception as error:
            failure = as_forkkv_error(error)
            set_error(grpc_context, failure)
            yield sessions_pb2.GenerateResponse(error=codec.write_error(failure))

    @unary(adapters_pb2.Adapter)
    async def LoadAdapter(self, request: adapters_pb2.LoadAdapterRequest, caller: str | None) -> adapters_pb2.Adapter:
        sharing = codec.read_sharing(request.sharing)
        return codec.write_adapter(await self.service.load_adapter(request.name, request.path, sharing))

    @unary(adapters_pb2.UnloadAdapterResponse)
    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, caller: str | None
    ) -> adapters_pb2.UnloadAdapterResponse:
        await self.service.unload_adapter(request.name)
        return adapters_pb2.UnloadAdapterResponse()

    @unary(adapters_pb2.ListAdaptersResponse)
    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, caller: str | None
    ) -> adapters_pb2.ListAdaptersResponse:
        adapters = await self.service.list_adapters()
        return adapters_pb2.ListAdaptersResponse(adapters=[codec.write_adapter(info) for info in adapters])

    @unary(cluster_pb2.ClusterStatus)
    async def GetClusterStatus(
        self, request: cluster_pb2.GetClusterStatusRequest, caller: str | None
    ) -> cluster_pb2.ClusterStatus:
        status = await self.service.status()
        return codec.write_status(status, self.service.model)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """grpc.health.v1: SERVING once a worker has answered. No token is needed, as probes carry none."""
        if request.service not in _HEALTH_SERVICES:
            set_error(grpc_context, NotFound("service", request.service, f"Known: {', '.join(_HEALTH_SERVICES[1:])}."))
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        return self._health()

    async def List(
        self, request: health_pb2.HealthListRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthListResponse:
        """grpc.health.v1: every service at once."""
        return health_pb2.HealthListResponse(statuses={name: self._health() for name in _HEALTH_SERVICES})

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """grpc.health.v1: refused, as the protocol allows. A watch would hold one of the gateway's request slots."""
        grpc_context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        grpc_context.set_details("Watch is not offered: poll Check.")
        yield self._health()

    def _health(self) -> health_pb2.HealthCheckResponse:
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if self.service.is_started else health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)
