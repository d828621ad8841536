"""An engine's own requests: tasks that ask in rounds, each round answered before the next is asked.

A task is a generator. It yields requests to run beside one another and is sent one ``Outcome`` for each; what it does with
them, and with the last ones, is its own affair. Tasks of a lane run one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from forkkv_cluster.core.errors import ForkKVError, ResourceExhausted
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.request import GenerateRequest, PromptLogprobs, TokenChunk, joined_prompt_logprobs
from forkkv_cluster.engine.outputs import Failure


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Of one request: its output and, where asked for, the scores of its prompt; or ``error``."""

    token_ids: tuple[int, ...] = ()
    scores: PromptLogprobs | None = None
    error: ForkKVError | None = None


Rounds: TypeAlias = Generator[list[GenerateRequest], list[Outcome], None]


@dataclass(slots=True, eq=False)
class _Task:
    owner: str
    rounds: Rounds
    pending: deque[GenerateRequest] = field(default_factory=deque)
    asked: list[RequestId] = field(default_factory=list)
    live: dict[RequestId, list[TokenChunk]] = field(default_factory=dict)
    outcomes: dict[RequestId, Outcome] = field(default_factory=dict)


class Lane:
    """Not thread-safe. ``add`` and ``abort`` are the engine's; what they answer comes back through ``take``."""

    def __init__(self, add: Callable[[GenerateRequest], None], abort: Callable[[RequestId], None]) -> None:
        self._add = add
        self._abort = abort
        self._waiting: deque[_Task] = deque()
        self._active: _Task | None = None
        self._orphans: set[RequestId] = set()

    @property
    def has_work(self) -> bool:
        return self._active is not None or bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Tasks that have not begun."""
        return len(self._waiting)

    def start(self, owner: str, rounds: Rounds) -> None:
        """Queue a task; ``owner`` is what ``cancel`` names it by."""
        self._waiting.append(_Task(owner, rounds))

    def drop_oldest(self) -> None:
        """Forget the task that has waited longest."""
        self._waiting.popleft().rounds.close()

    def cancel(self, owner: str | None = None) -> int:
        """End that owner's tasks, or the active one for None; returns how many. Their requests are aborted."""
        doomed = [task for task in self._waiting if task.owner == owner]
        self._waiting = deque(task for task in self._waiting if task.owner != owner)
        if self._active is not None and owner in (None, self._active.owner):
            for request_id in self._active.live:
                self._orphans.add(request_id)
                self._abort(request_id)
            doomed.append(self._active)
            self._active = None
        for task in doomed:
            task.rounds.close()
        return len(doomed)

    def submit(self) -> None:
        """Hand the engine what the active task asks for; a full queue keeps the rest for later."""
        while self._active is None and self._waiting:
            self._active = self._waiting.popleft()
            self._next_round(self._active, None)
        task = self._active
        while task is not None and task.pending:
            request = task.pending[0]
            try:
                self._add(request)
            except ResourceExhausted:
                return
            except ForkKVError as error:
                task.pending.popleft()
                self._settle(task, request.request_id, Outcome(error=error))
            else:
                task.pending.popleft()
                task.live[request.request_id] = []
            task = self._active

    def take(self, chunks: Iterable[TokenChunk], failures: Iterable[Failure]) -> tuple[list[TokenChunk], list[Failure]]:
        """Keep what answers this lane's requests; returns the rest."""
        if self._active is None and not self._orphans:
            return list(chunks), list(failures)
        other_chunks = [chunk for chunk in chunks if not self._took_chunk(chunk)]
        return other_chunks, [failure for failure in failures if not self._took_failure(failure)]

    def _took_chunk(self, chunk: TokenChunk) -> bool:
        request_id = chunk.request_id
        if request_id in self._orphans:
            if chunk.finish_reason is not None:
                self._orphans.discard(request_id)
            return True
        task = self._active
        if task is None or request_id not in task.live:
            return False
        task.live[request_id].append(chunk)
        if chunk.finish_reason is not None:
            self._settle(task, request_id, _outcome(task.live.pop(request_id)))
        return True

    def _took_failure(self, failure: Failure) -> bool:
        request_id = failure.request_id
        if request_id in self._orphans:
            self._orphans.discard(request_id)
            return True
        task = self._active
        if task is None or task.live.pop(request_id, None) is None:
            return False
        self._settle(task, request_id, Outcome(error=failure.error))
        return True

    def _settle(self, task: _Task, request_id: RequestId, outcome: Outcome) -> None:
        task.outcomes[request_id] = outcome
        if not task.pending and not task.live and len(task.outcomes) == len(task.asked):
            self._next_round(task, [task.outcomes[asked] for asked in task.asked])

    def _next_round(self, task: _Task, outcomes: list[Outcome] | None) -> None:
        """Ask the task; rounds without a request are answered at once."""
        while True:
            try:
                requests = next(task.rounds) if outcomes is None else task.rounds.send(outcomes)
            except StopIteration:
                self._active = None
                return
            task.pending = deque(requests)
            task.asked, task.outcomes = [request.request_id for request in requests], {}
            if requests:
                return
            outcomes = []


def _outcome(chunks: Sequence[TokenChunk]) -> Outcome:
    parts = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None]
    return Outcome(tuple(token for chunk in chunks for token in chunk.token_ids), joined_prompt_logprobs(parts))
