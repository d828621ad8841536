"""How publishers, mirrors and gateways talk to the directory actor: never blocking, ``Unavailable`` when it is away."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError

from forkkv_cluster.core.errors import FailedPrecondition, Unavailable
from forkkv_cluster.core.events import EventBatch
from forkkv_cluster.core.ids import WorkerId
from forkkv_cluster.core.status import DirectoryStatus
from forkkv_cluster.directory.actor import NAMESPACE, directory_name, get_or_create
from forkkv_cluster.directory.changes import Delta
from forkkv_cluster.directory.mirror import DirectoryMirror

__all__ = ["DeltaSource", "DirectoryClient", "directory_name", "follow", "kill_directory"]

logger = logging.getLogger(__name__)


class DeltaSource(Protocol):
    """Where a mirror's deltas come from: a ``DirectoryClient``, or the plain ``DirectoryActor`` in tests."""

    async def deltas(self, incarnation: str, version: int, timeout_s: float) -> Delta: ...


class DirectoryClient:
    """Implements ``core.ports.EventSink``. Every call raises ``Unavailable`` when the actor is away or slow, and
    FailedPrecondition once this process has left Ray.

    ``creates`` says whether a missing actor is made anew (workers do, so that it comes back) or only reported.
    """

    def __init__(self, name: str, *, creates: bool, timeout_s: float = 10.0) -> None:
        self._name = name
        self._creates = creates
        self._timeout_s = timeout_s
        self._handle: Any = None

    async def apply(self, batch: EventBatch) -> int:
        """Apply and return the sequence number expected next."""
        return int(await self._call("apply", batch))

    async def deltas(self, incarnation: str, version: int, timeout_s: float) -> Delta:
        """Changes since ``version``; waits up to ``timeout_s`` for the first one."""
        delta: Delta = await self._call("deltas", incarnation, version, timeout_s, patience_s=timeout_s)
        return delta

    async def status(self) -> DirectoryStatus:
        status: DirectoryStatus = await self._call("status")
        return status

    async def drop_worker(self, worker_id: WorkerId) -> bool:
        """Forget a worker that was seen to die."""
        return bool(await self._call("drop_worker", worker_id))

    async def _call(self, method: str, *args: Any, patience_s: float = 0.0) -> Any:
        if not ray.is_initialized():
            # Ray would start a new, empty cluster of its own accord.
            raise FailedPrecondition("this process has left its Ray cluster, and with it the directory.")
        handle = await self._connect()
        try:
            async with asyncio.timeout(self._timeout_s + patience_s):
                return await getattr(handle, method).remote(*args)
        except TimeoutError:
            raise Unavailable(f"directory {self._name!r} did not answer {method} within {self._timeout_s} s.") from None
        except RayActorError as error:
            self._handle = None
            raise Unavailable(f"directory {self._name!r} is away ({type(error).__name__}).") from None
        except RayError as error:
            # A fault inside the directory must not take the workers down with it: it is a hint, and worth a retry.
            raise Unavailable(f"directory {self._name!r} failed in {method}: {error}") from None

    async def _connect(self) -> Any:
        if self._handle is None:
            # Looking an actor up is a blocking call of Ray's.
            self._handle = await asyncio.to_thread(self._look_up)
        return self._handle

    def _look_up(self) -> Any:
        try:
            return get_or_create(self._name) if self._creates else ray.get_actor(self._name, NAMESPACE)
        except ValueError:
            raise Unavailable(f"directory {self._name!r} is not there yet; a worker creates it.") from None
        except RayError as error:
            raise Unavailable(f"directory {self._name!r} cannot be reached ({type(error).__name__}).") from None


def kill_directory(app_name: str) -> bool:
    """End the application's directory for good, at shutdown. Blocks. False when there is none."""
    try:
        handle = ray.get_actor(directory_name(app_name), NAMESPACE)
    except ValueError:
        return False
    ray.kill(handle, no_restart=True)
    return True


async def follow(
    mirror: DirectoryMirror,
    source: DeltaSource,
    *,
    poll_timeout_s: float = 10.0,
    min_interval_s: float = 0.01,
    retry_s: float = 0.5,
) -> None:
    """Keep ``mirror`` up to date until cancelled. While the directory is away the mirror stays as it was.

    ``min_interval_s`` bounds how often a busy directory is asked: changes in between come together.
    """
    is_away = False
    while True:
        try:
            delta = await source.deltas(mirror.incarnation, mirror.version, poll_timeout_s)
        except Unavailable as error:
            if not is_away:
                logger.warning("the directory is away; routing goes on from the mirror: %s", error)
            is_away = True
            await asyncio.sleep(retry_s)
            continue
        if is_away:
            logger.info("the directory is back, incarnation %s", delta.incarnation)
        is_away = False
        if not mirror.apply(delta):
            # Two answers crossed: the next question, from the mirror's own version, is in order again.
            logger.debug("delta %d..%d does not continue version %d", delta.since, delta.version, mirror.version)
        await asyncio.sleep(min_interval_s)
