"""The ingress deployment: HTTP and gRPC of one gateway in one Serve class. Thin: everything is in ``GatewayService``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from ray import serve

from forkkv_cluster.core.clock import SystemClock
from forkkv_cluster.core.config import ClusterConfig
from forkkv_cluster.core.errors import Unavailable
from forkkv_cluster.core.status import DirectoryStatus
from forkkv_cluster.directory.client import DirectoryClient, directory_name
from forkkv_cluster.gateway.openai_api import build_http_app
from forkkv_cluster.gateway.service import GatewayService
from forkkv_cluster.gateway.servicer import GrpcServicer
from forkkv_cluster.gateway.session_store import open_session_store
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.gateway.worker_pool import ServeWorkerPool


def _http_app() -> FastAPI:
    """Built in the replica, by Serve, once the gateway object exists."""
    return build_http_app(lambda: serve.get_replica_context().servable_object.service)  # type: ignore[attr-defined]


@serve.ingress(_http_app)
class AgentGateway(GrpcServicer):
    """Ready once a worker has answered. ``workers`` is the handle of the worker deployment."""

    async def __init__(self, config: ClusterConfig, workers: Any) -> None:  # type: ignore[misc]  # Serve awaits it.
        self._directory = DirectoryClient(directory_name(config.server.app_name), creates=False)
        self._store = open_session_store(config.gateway.session_store)
        self.service = GatewayService(
            config,
            ServeWorkerPool(workers),
            self._store,
            Tokenization.from_dir(config.model.path),
            SystemClock(),
            version=version("forkkv-cluster"),
            directory_status=self._directory_status,
        )
        await self.service.start()

    async def _directory_status(self) -> DirectoryStatus | None:
        try:
            return await self._directory.status()
        except Unavailable:
            return None
