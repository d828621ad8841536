"""One run of a trace on a cluster: a task for each event that is due."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from forkkv_cluster.bench.metrics import RunRecord, TurnRecord
from forkkv_cluster.bench.schedule import Schedule
from forkkv_cluster.bench.trace import ContextEvent, JoinEvent, Trace, TurnEvent
from forkkv_cluster.client import AsyncBranch, AsyncForkKVClient, AsyncSession, BranchSpec, Delta, Finished
from forkkv_cluster.core.errors import Internal

if TYPE_CHECKING:
    from forkkv_cluster.bench.grpc_target import GrpcTarget
    from forkkv_cluster.bench.target import OnProgress


class GrpcRun:
    """State of one run: sessions by context id, branches by (context id, name)."""

    def __init__(self, target: GrpcTarget, client: AsyncForkKVClient, trace: Trace, on_progress: OnProgress) -> None:
        self._target = target
        self._client = client
        self._trace = trace
        self._on_progress = on_progress
        self._schedule = Schedule(trace)
        self._record = RunRecord()
        self._sessions: dict[str, AsyncSession] = {}
        self._branches: dict[tuple[str, str], AsyncBranch] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._started_s = 0.0

    async def run(self) -> RunRecord:
        """Until every event has ended. Sessions that the trace leaves open are closed then, out of the measured time."""
        self._started_s = time.monotonic()
        try:
            while not self._schedule.is_done:
                self._start_due()
                await self._wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for session in self._sessions.values():
                await session.close()
        return self._record

    def _now_s(self) -> float:
        return time.monotonic() - self._started_s

    def _start_due(self) -> None:
        for index in self._schedule.start_due(self._now_s()):
            self._record.event_started(self._schedule.due_s(index))
            self._tasks.add(asyncio.create_task(self._event(index)))

    async def _wait(self) -> None:
        """Until an event ends or the next one is due. Raises what an event raised."""
        next_s = self._schedule.next_due_s()
        timeout_s = None if next_s is None else max(0.0, next_s - self._now_s())
        if self._tasks:
            done, self._tasks = await asyncio.wait(self._tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        elif timeout_s is not None:
            await asyncio.sleep(timeout_s)
        elif not self._schedule.is_done:
            raise Internal("nothing runs and nothing is due, but the trace has not ended.")

    async def _event(self, index: int) -> None:
        event = self._schedule.events[index]
        if isinstance(event, TurnEvent):
            await self._turn(event, self._schedule.due_s(index))
        elif isinstance(event, ContextEvent):
            await self._open(event)
        elif isinstance(event, JoinEvent):
            await self._sessions[event.context].join(event.branch, event.what)
        else:
            await self._sessions.pop(event.context).close()
        self._schedule.end(index, self._now_s())
        self._on_progress(self._schedule.num_ended)

    async def _open(self, event: ContextEvent) -> None:
        session = await self._client.create_session(
            token_ids=event.source.array(self._trace.vocab_size).tolist(),
            adapters=event.adapters,
            sharing=self._target.sharing,
            tenant=self._target.tenant(event.tenant),
        )
        self._sessions[event.id] = session
        self._target.note_writer(session.info.writer)

    async def _turn(self, event: TurnEvent, due_s: float) -> None:
        record = TurnRecord(event.id, event.branch, event.adapter, due_s)
        self._record.turns.append(record)
        stream = (await self._branch(event)).stream(
            token_ids=event.append.array(self._trace.vocab_size).tolist(),
            max_tokens=event.max_tokens,
            ignore_eos=True,
            seed=self._target.seed,
        )
        async for message in stream:
            if isinstance(message, Delta):
                record.add_tokens(message.token_ids, self._now_s())
            elif isinstance(message, Finished):
                record.usage = message.usage
                record.worker = ",".join(message.worker_ids)

    async def _branch(self, event: TurnEvent) -> AsyncBranch:
        """The event's branch; its first turn forks it."""
        key = (event.context, event.branch)
        if key not in self._branches:
            (self._branches[key],) = await self._sessions[event.context].fork([BranchSpec(event.branch, event.adapter)])
        return self._branches[key]
