"""Waiting for a cluster to run nothing, so that its counters can be read."""

from __future__ import annotations

import asyncio
import time

from forkkv_cluster.client import AsyncForkKVClient, Status
from forkkv_cluster.core.errors import Unavailable

_POLL_S = 0.05


async def wait_until_idle(client: AsyncForkKVClient, timeout_s: float = 120.0) -> Status:
    """The status once no worker runs or queues anything: a context pass may go on after the last turn.

    Raises Unavailable after ``timeout_s`` seconds.
    """
    give_up_s = time.monotonic() + timeout_s
    while True:
        status = await client.status()
        if all(worker.engine.num_running + worker.engine.num_waiting == 0 for worker in status.cluster.workers):
            return status
        if time.monotonic() > give_up_s:
            raise Unavailable(f"the cluster still runs requests after {timeout_s:.0f} s. Use it for nothing else.")
        await asyncio.sleep(_POLL_S)
