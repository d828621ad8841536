"""Waiting for what a cluster does in its own time, and a document to share."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from forkkv_cluster.client import ForkKVClient, Session
from forkkv_cluster.core.status import WorkerStatus

DOCUMENT = "The harbour was dredged in the spring, and the town paid for it with a tax on salt. " * 12
ADAPTERS = ("planner", "critic", "coder", "tester")


def eventually(is_true: Callable[[], bool], *, what: str, timeout_s: float = 60.0) -> None:
    """Ask again and again, up to ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(0.05)


def workers(client: ForkKVClient) -> tuple[WorkerStatus, ...]:
    return client.status().cluster.workers


def wait_for_workers(client: ForkKVClient, number: int) -> None:
    eventually(lambda: len(workers(client)) == number, what=f"{number} workers")


def is_idle(client: ForkKVClient) -> bool:
    """Nothing runs, waits or is pinned on any worker."""
    states = [worker.engine for worker in workers(client)]
    return all(s.num_running == s.num_waiting == s.num_pinned_pages == 0 for s in states)


def wait_until_idle(client: ForkKVClient) -> None:
    # Short against the seconds that a long answer takes: a cancellation that got lost must not pass for one that worked.
    eventually(lambda: is_idle(client), what="idle workers", timeout_s=5.0)


def opened(client: ForkKVClient, sharing: str = "eager", document: str = DOCUMENT) -> Session:
    return client.create_session(document, adapters=ADAPTERS, sharing=sharing)


def address_of_this_machine() -> str:
    """An IPv4 address of this machine that is not loopback; skips the test where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # UDP: no packet is sent, only the route is looked up.
        except OSError:
            pytest.skip("this machine has no address besides loopback")
        return str(probe.getsockname()[0])
