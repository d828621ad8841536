"""How workers serve ``auto`` on each adapter, as a gateway knows it: never older than a few seconds, asked only when needed.

Requests name a sharing by the time they reach a worker, because their pages are named by it. What a gateway does not know, it
serves ``isolated``: ignorance costs time, never fidelity.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.errors import ForkKVError
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo, AdapterRef, Sharing
from forkkv_cluster.core.request_builder import NO_MODES, Modes
from forkkv_cluster.core.session import Session
from forkkv_cluster.core.verdict import SharingVerdict, merged
from forkkv_cluster.gateway.worker_pool import WorkerLost, WorkerPool

logger = logging.getLogger(__name__)

FRESH_S = 1.0
"""Older knowledge is asked for anew, beside the request that found it old."""

MAX_AGE_S = 5.0
"""Still older knowledge is not used: the request waits for the answer."""

Verdicts = dict[tuple[str, AdapterDigest], SharingVerdict]
"""By name and content."""


def merged_verdicts(workers: Iterable[Sequence[AdapterInfo]]) -> Verdicts:
    """Of what each worker lists; the most cautious where they differ."""
    said: dict[tuple[str, AdapterDigest], list[SharingVerdict]] = {}
    for infos in workers:
        for info in infos:
            if info.verdict is not None:
                said.setdefault((info.name, info.digest), []).append(info.verdict)
    return {key: found for key, verdicts in said.items() if (found := merged(verdicts)) is not None}


class SharingView:
    """One gateway's. Used on its event loop."""

    def __init__(self, pool: WorkerPool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self._verdicts: Verdicts = {}
        self._asked_s: float | None = None
        self._asking: asyncio.Task[None] | None = None

    async def verdicts(self) -> Verdicts:
        """At most ``MAX_AGE_S`` old; empty when no worker answers."""
        age_s = self._clock.monotonic() - self._asked_s if self._asked_s is not None else float("inf")
        if age_s >= FRESH_S and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask(), context=contextvars.Context())
        if age_s >= MAX_AGE_S and self._asking is not None:
            await asyncio.shield(self._asking)
        return self._verdicts

    def forget(self) -> None:
        """Adapters have changed: the next question goes to the workers."""
        self._asked_s = self._asking = None

    async def modes(self, adapters: Sequence[AdapterRef]) -> Modes:
        """What ``auto`` comes to on these adapters now."""
        if not adapters:
            return NO_MODES
        verdicts = await self.verdicts()
        return {ref.name: verdicts[ref.name, ref.digest].sharing for ref in adapters if (ref.name, ref.digest) in verdicts}

    async def modes_of(self, session: Session, sharing: Sharing) -> Modes:
        """The same for a session's adapters, where the session or a branch of it with ``sharing`` asks for ``auto``."""
        return await self.modes(session.adapters if Sharing.AUTO in (session.sharing, sharing) else ())

    def described(self, infos: Sequence[AdapterInfo], verdicts: Verdicts) -> tuple[AdapterInfo, ...]:
        """``infos``, each with its verdict."""
        return tuple(replace(info, verdict=verdicts.get((info.name, info.digest))) for info in infos)

    async def _ask(self) -> None:
        asked_s = self._clock.monotonic()
        try:
            results = await self._pool.broadcast("list_adapters")
        except (ForkKVError, WorkerLost) as error:
            logger.warning("no worker says how auto is served; its requests are served isolated: %s", error)
            results = []
        if self._asked_s is not None and self._asked_s > asked_s:
            return  # somebody asked later, and has the answer
        self._verdicts = merged_verdicts(result for result in results if not isinstance(result, BaseException))
        self._asked_s = asked_s
