"""A Ray cluster with two workers on fake engines, routed by our router from this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from ray import serve

from forkkv_cluster.core.config import ClusterConfig, ServerConfig, WorkerConfig
from forkkv_cluster.directory.client import directory_name, kill_directory
from forkkv_cluster.routing.request_router import router_config
from forkkv_cluster.testing.fake_engine import make_fake_engine
from forkkv_cluster.worker.deployment import ForkKVWorker


@dataclass(frozen=True)
class RoutedWorkers:
    app_name: str
    handle: Any


@pytest.fixture(scope="module")
def ray_runtime() -> Iterator[None]:
    """Uses a cluster that this process has, else starts one and ends it."""
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
        serve.start(proxy_location="Disabled")
    yield
    if is_ours:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def routed_workers(ray_runtime: None) -> Iterator[RoutedWorkers]:
    app_name = "routing-test"
    config = ClusterConfig(server=ServerConfig(app_name=app_name), worker=WorkerConfig(stats_interval_s=0.1))
    deployment = serve.deployment(
        ForkKVWorker,
        name="worker",
        num_replicas=2,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=router_config(config, directory_name(app_name)),
        graceful_shutdown_timeout_s=1.0,
    )
    handle = serve.run(deployment.bind(config, make_fake_engine), name=app_name, route_prefix=None)
    yield RoutedWorkers(app_name, handle)
    serve.delete(app_name)
    kill_directory(app_name)
