"""One run of a trace on an engine: a single thread that adds what is due, then steps the engine.

Arrivals during a step wait for its end, as they do in a worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from forkkv_cluster.bench.metrics import RunRecord, TurnRecord
from forkkv_cluster.bench.schedule import Schedule
from forkkv_cluster.bench.trace import ContextEvent, JoinEvent, Trace, TurnEvent
from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterInfo, ContextRequest, GenerateRequest, ModelInfo, TokenChunk
from forkkv_cluster.core.session import BranchSpec, Session
from forkkv_cluster.core.status import EngineStatus
from forkkv_cluster.engine.outputs import StepOutput

if TYPE_CHECKING:
    from forkkv_cluster.bench.offline import OfflineTarget
    from forkkv_cluster.bench.target import OnProgress


class EngineFacade(Protocol):
    """The part of ``engine.engine.Engine`` that a run needs."""

    @property
    def model_info(self) -> ModelInfo: ...

    @property
    def has_work(self) -> bool: ...

    def add_request(self, request: GenerateRequest | ContextRequest) -> None: ...

    def step(self) -> StepOutput: ...

    def status(self) -> EngineStatus: ...

    def list_adapters(self) -> tuple[AdapterInfo, ...]: ...


@dataclass(frozen=True, slots=True, eq=False)
class _LiveTurn:
    index: int
    event: TurnEvent
    record: TurnRecord
    appended: TokenArray


class OfflineRun:
    """State of one run: sessions by context id, live turns by request id."""

    def __init__(self, target: OfflineTarget, trace: Trace, on_progress: OnProgress) -> None:
        self._target = target
        self._trace = trace
        self._on_progress = on_progress
        self._schedule = Schedule(trace)
        self._record = RunRecord()
        self._sessions: dict[str, Session] = {}
        self._live: dict[RequestId, _LiveTurn] = {}
        self._started_s = target.clock.monotonic()

    def run(self) -> RunRecord:
        """Until every event has ended and the engine is idle: passes after the last token still count as prefill."""
        engine = self._target.engine
        while not self._schedule.is_done:
            self._start_due()
            if engine.has_work:
                self._deliver(engine.step())
            elif not self._schedule.is_done:
                self._wait()
        while engine.has_work:
            self._deliver(engine.step())
        return self._record

    def _now_s(self) -> float:
        return self._target.clock.monotonic() - self._started_s

    def _wait(self) -> None:
        next_s = self._schedule.next_due_s()
        if next_s is None:
            raise Internal("the engine is idle while turns wait for it: it lost a request without a terminal result.")
        self._target.sleep(max(0.0, next_s - self._now_s()))

    def _start_due(self) -> None:
        # What ends at once (a context, a join, a close) can make others due at once.
        while due := self._schedule.start_due(self._now_s()):
            for index in due:
                self._record.event_started(self._schedule.due_s(index))
                self._start(index)

    def _start(self, index: int) -> None:
        event = self._schedule.events[index]
        if isinstance(event, TurnEvent):
            self._start_turn(index, event)
            return
        if isinstance(event, ContextEvent):
            self._sessions[event.id] = self._target.open_session(event, self._trace.vocab_size)
            self._run_context(event.id)
        elif isinstance(event, JoinEvent):
            self._sessions[event.context], _ = self._sessions[event.context].join(event.branch, event.what)
            self._run_context(event.context)
        else:
            del self._sessions[event.context]
        self._end(index)

    def _run_context(self, context: str) -> None:
        session = self._sessions[context]
        if session.needs_context_pass:
            self._target.engine.add_request(self._target.context_pass(session))

    def _start_turn(self, index: int, event: TurnEvent) -> None:
        session = self._sessions[event.context]
        if event.branch not in session.branches:
            session = session.fork((BranchSpec(event.branch, event.adapter),))
            self._sessions[event.context] = session
        appended = event.append.array(self._trace.vocab_size)
        branch = session.branch(event.branch)
        branch.check_turn(appended)
        request = self._target.turn(session, branch, appended, event.max_tokens)
        record = TurnRecord(event.id, event.branch, event.adapter, self._schedule.due_s(index), worker="offline")
        self._record.turns.append(record)
        self._live[request.request_id] = _LiveTurn(index, event, record, appended)
        self._target.engine.add_request(request)

    def _deliver(self, output: StepOutput) -> None:
        for failure in output.failures:
            raise failure.error
        now_s = self._now_s()
        for chunk in output.chunks:
            if chunk.request_id in self._live:
                self._take(chunk, now_s)

    def _take(self, chunk: TokenChunk, now_s: float) -> None:
        turn = self._live[chunk.request_id]
        turn.record.add_tokens(chunk.token_ids, now_s)
        if chunk.usage is not None:
            turn.record.usage = chunk.usage
        if chunk.finish_reason is None:
            return
        del self._live[chunk.request_id]
        generated = np.array(turn.record.token_ids, dtype=np.int32)
        session = self._sessions[turn.event.context]
        self._sessions[turn.event.context] = session.finish_turn(turn.event.branch, turn.appended, generated)
        self._end(turn.index)

    def _end(self, index: int) -> None:
        self._schedule.end(index, self._now_s())
        self._on_progress(self._schedule.num_ended)
