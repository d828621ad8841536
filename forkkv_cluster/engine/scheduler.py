"""What runs in the next step: continuous batching with chunked prefill. Decides; never touches a device.

Order of a step: running decodes, then running prefills in chunks, then admissions, all within
``max_num_batched_tokens``; so a prompt delays a running decode by at most that many tokens a step. A request is
admitted with pages for its whole prompt or not at all, in order of priority and arrival.
"""

from __future__ import annotations

import bisect
import enum
from dataclasses import dataclass, field

from forkkv_cluster.cache.kv_cache_manager import KVCacheManager
from forkkv_cluster.core.config import SchedulerConfig
from forkkv_cluster.core.errors import ResourceExhausted
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.engine.context_planner import PassPlan, match_needs, next_pass, restore_needs
from forkkv_cluster.engine.sequence import ContextPass, Demand, Runnable, Scheduled, Turn, Waiting, note_match

MAX_PASSES_PER_REQUEST = 8
"""Context passes one request may cause beside others. After them it waits until nothing runs that could evict what it
writes; as many again, alone, mean that nothing can help."""


class _Outcome(enum.Enum):
    WAITS = enum.auto()  # for a pass under way
    ENDED = enum.auto()  # without running: nothing was missing, or nothing can help
    NO_ROOM = enum.auto()


@dataclass(slots=True)
class StepPlan:
    """Work of one step; context requests that found everything there; requests that cannot go on."""

    work: list[Scheduled] = field(default_factory=list)
    completed: list[Demand] = field(default_factory=list)
    starved: list[Waiting] = field(default_factory=list)


class Scheduler:
    """Owns the queues of one engine. Not thread-safe. ``schedule`` opens leases, ``finish`` and ``remove`` release them."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager) -> None:
        self._config = config
        self._kv = kv
        self._waiting: list[Waiting] = []  # by order: priority, then arrival
        self._running: list[Runnable] = []
        self._flights: dict[tuple[object, ...], ContextPass] = {}
        self.num_preemptions = 0

    # --- queues -----------------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> tuple[Runnable, ...]:
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        return tuple(self._waiting)

    def add(self, entry: Waiting) -> None:
        """Queue a request. Raises ResourceExhausted with a retry hint when the queue is full."""
        if len(self._waiting) >= self._config.max_num_waiting:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests wait already, the limit of this worker. Try again later.",
                self._config.retry_after_s,
            )
        bisect.insort(self._waiting, entry, key=_order)

    def remove(self, request_id: RequestId) -> Waiting | None:
        """Take a request out, wherever it is, with what it holds; a pass goes when nobody waits for it any more."""
        for flight in list(self._flights.values()):
            flight.interested.discard(request_id)
            if not flight.interested:
                self.finish(flight)
        for position, entry in enumerate(self._waiting):
            if entry.request_id == request_id:
                return self._waiting.pop(position)
        for item in self._running:
            if isinstance(item, Turn) and item.request_id == request_id:
                self.finish(item)
                return item
        return None

    def finish(self, item: Runnable) -> None:
        """The item runs no more: release its lease. What it has computed stays cached."""
        self._running.remove(item)
        if isinstance(item, ContextPass):
            del self._flights[item.flight]
            self._kv.release_context(item.lease)
        elif item.lease is not None:
            self._kv.release(item.lease)
            item.lease = None

    # --- one step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The work of one step."""
        plan = StepPlan()
        budget = self._schedule_decodes(plan, self._config.max_num_batched_tokens)
        budget = self._schedule_prefills(plan, budget)
        self._admit(plan, budget)
        return plan

    def _schedule_decodes(self, plan: StepPlan, budget: int) -> int:
        for item in list(self._running):
            is_decode = isinstance(item, Turn) and item.lease is not None and item.num_uncomputed == 1
            if budget > 0 and isinstance(item, Turn) and is_decode and self._grow(item):
                plan.work.append(Scheduled(item, item.num_computed, item.num_tokens))
                budget -= 1
        # Growing one turn may have preempted another that stands in the plan already.
        plan.work = [s for s in plan.work if isinstance(s.item, Turn) and s.item.lease is not None]
        return budget

    def _schedule_prefills(self, plan: StepPlan, budget: int) -> int:
        decoding = {id(s.item) for s in plan.work}
        for item in self._running:
            if budget > 0 and id(item) not in decoding:
                budget -= _schedule_chunk(plan, item, budget)
        return budget

    def _grow(self, turn: Turn) -> bool:
        """Room for one more token, preempting the youngest as needed; False when ``turn`` itself had to go."""
        while turn.lease is not None:
            if self._kv.grow(turn.lease, turn.num_tokens):
                return True
            self._preempt(max(self._running, key=_order))
        return False

    def _preempt(self, item: Runnable) -> None:
        """Give an item's memory to older ones. A pass starts anew for those who wait; a turn goes on where it stopped."""
        self.num_preemptions += 1
        self.finish(item)
        if isinstance(item, Turn):
            item.num_computed = 0
            bisect.insort(self._waiting, item, key=_order)

    # --- admission --------------------------------------------------------------------------------------------------

    def _admit(self, plan: StepPlan, budget: int) -> None:
        for entry in tuple(self._waiting):
            if budget <= 0 or len(self._running) >= self._config.max_num_seqs:
                return
            started = self._start(entry, plan)
            if started is _Outcome.NO_ROOM:
                return  # nobody overtakes a request that waits for memory
            if isinstance(started, Turn | ContextPass):
                self._running.append(started)
                budget -= _schedule_chunk(plan, started, budget)

    def _start(self, entry: Waiting, plan: StepPlan) -> Runnable | _Outcome:
        """What to run for ``entry`` now: itself, or a pass that it needs."""
        if entry.needs is not None:
            restore_needs(self._kv, entry.needs)
            match, missing = match_needs(self._kv, entry.needs)
            wanted = next_pass(entry.needs, match, missing)
            if wanted is not None and wanted.flight in self._flights:
                self._flights[wanted.flight].interested.add(entry.request_id)
                return _Outcome.WAITS
            if isinstance(entry, Demand) or (wanted is not None and _is_own(entry, wanted)):
                note_match(entry, match)
            if wanted is not None:
                return self._start_pass(entry, wanted, plan)
        if isinstance(entry, Demand):
            self._waiting.remove(entry)
            plan.completed.append(entry)
            return _Outcome.ENDED
        return self._start_turn(entry)

    def _start_turn(self, turn: Turn) -> Turn | _Outcome:
        lease = self._kv.open_sequence(
            turn.request.prefix, turn.tokens, turn.num_tokens, turn.fork_point, turn.residual, turn.max_cached
        )
        if lease is None:
            return _Outcome.NO_ROOM
        self._waiting.remove(turn)
        turn.open(lease)
        return turn

    def _start_pass(self, entry: Waiting, wanted: PassPlan, plan: StepPlan) -> ContextPass | _Outcome:
        if entry.num_passes >= MAX_PASSES_PER_REQUEST and self._running:
            return _Outcome.NO_ROOM
        if entry.num_passes >= 2 * MAX_PASSES_PER_REQUEST:
            self._waiting.remove(entry)
            plan.starved.append(entry)
            return _Outcome.ENDED
        needs = entry.needs
        if needs is None:
            raise ValueError("a pass is planned only for a request with shared context")
        lease = self._kv.open_context(
            needs.key,
            needs.tokens,
            needs.context_len,
            [t.key for t in wanted.required],
            [t.key for t in wanted.optional],
        )
        if lease is None:
            return _Outcome.NO_ROOM
        entry.num_passes += 1
        targets = {t.key: t.adapter for t in (*wanted.required, *wanted.optional)}
        item = ContextPass(
            wanted.kind,
            wanted.flight,
            lease,
            wanted.adapter,
            targets,
            entry,
            _is_own(entry, wanted),
            {entry.request_id},
            lease.run_start,
        )
        self._flights[wanted.flight] = item
        return item


def _is_own(entry: Waiting, wanted: PassPlan) -> bool:
    """Whether a pass is the request's own work. A pass of another writer is a request of its own: the entry waits for it
    and then finds its pages, as every other branch does."""
    return isinstance(entry, Demand) or (wanted.adapter is not None and wanted.adapter is entry.adapter)


def _order(item: Waiting | Runnable) -> tuple[int, int]:
    return item.order


def _schedule_chunk(plan: StepPlan, item: Runnable, budget: int) -> int:
    end = min(item.num_tokens, item.num_computed + budget)
    plan.work.append(Scheduled(item, item.num_computed, end))
    return end - item.num_computed
