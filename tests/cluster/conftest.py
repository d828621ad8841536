"""Clients of the one running cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from forkkv_cluster.app import RunningCluster
from forkkv_cluster.client import ForkKVClient
from tests.cluster.helpers import wait_for_workers


@pytest.fixture
def client(serve_cluster: RunningCluster) -> Iterator[ForkKVClient]:
    """Connected once both workers are up: an earlier test may have killed one."""
    with ForkKVClient(serve_cluster.grpc_address, timeout_s=60.0) as client:
        wait_for_workers(client, serve_cluster.config.worker.num_replicas)
        yield client
