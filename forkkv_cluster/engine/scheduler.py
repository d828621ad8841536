"""What runs in the next step: continuous batching with chunked prefill. Decides; never touches a device.

Order of a step: running decodes, then prompts under way in chunks, by priority and by what their tenant has had, then
admissions, all within ``max_num_batched_tokens``. Prompts under way come first because those that wait may share their
prefix: started beside one another, 16 agents over one context ran 32,000 prompt tokens in place of 5,120. So what waits goes
before prompts of a lower priority only where nothing under way computes its prefix.
While anything decodes, prompts have at most ``max_prefill_tokens_beside_decodes`` of them: the longest that a prompt, of
whatever length, delays a running decode.

The engine's own work (``sequence.BACKGROUND``) takes what clients leave of a step, ``max_background_tokens`` at most where they
leave anything to run beside; it is preempted for a client that finds no room, no slot or too many sequences.

Admission goes by ``FairQueue``: priority, then the tenant that has had least, then arrival. A request starts with a slot
for its adapter and pages for its whole prompt, or not at all:

- Nobody overtakes a request that waits for memory.
- One that waits for weights from disk, or for another's pass over its context, lets others pass: what it waits for comes.
- One that waits for a slot lets others pass that have theirs, so that requests of one adapter run together; after
  ``max_overtakes`` of them, the slot with the fewest users takes nobody new from behind it, runs empty, and is its own.
"""

from __future__ import annotations

from forkkv_cluster.cache.kv_cache_manager import KVCacheManager
from forkkv_cluster.core.clock import Clock, SystemClock
from forkkv_cluster.core.config import SchedulerConfig
from forkkv_cluster.core.errors import ResourceExhausted
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.engine.adapter_tiers import AdapterTiers, LoadedAdapter
from forkkv_cluster.engine.context_planner import PassPlan, match_needs, next_pass, restore_needs
from forkkv_cluster.engine.fair_queue import FairQueue
from forkkv_cluster.engine.retry_hint import RetryHint
from forkkv_cluster.engine.sequence import (
    ContextNeeds,
    ContextPass,
    Demand,
    Runnable,
    Scheduled,
    Turn,
    Waiting,
    is_background,
    note_match,
)
from forkkv_cluster.engine.shared_prefix import is_computing_prefix_of
from forkkv_cluster.engine.slot_claims import SlotClaims
from forkkv_cluster.engine.step_plan import Outcome, StepPlan

MAX_PASSES_PER_REQUEST = 8
"""Context passes one request may cause beside others, and besides one for each residual that it requires. After them it waits
until nothing runs that could evict what it writes; as many again, alone, mean that nothing can help."""


class Scheduler:
    """Owns the queues of one engine. Not thread-safe. ``schedule`` opens leases and pins slots, ``finish`` and ``remove``
    give them back."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager, tiers: AdapterTiers, clock: Clock | None = None) -> None:
        self._config = config
        self._kv = kv
        self._tiers = tiers
        self._claims = SlotClaims(tiers, config.max_overtakes)
        self._queue = FairQueue()
        self._running: list[Runnable] = []
        self._flights: dict[tuple[object, ...], ContextPass] = {}
        self._retry_hint = RetryHint(config.retry_after_s, clock or SystemClock())
        self.num_preemptions = 0

    # --- queues -----------------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        return bool(self._queue or self._running)

    @property
    def has_waiting_clients(self) -> bool:
        """Whether anybody waits but the engine's own work."""
        return self._queue.num_clients > 0

    @property
    def running(self) -> tuple[Runnable, ...]:
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        return tuple(self._queue)

    @property
    def claims(self) -> list[LoadedAdapter]:
        """Every pin of a slot that is held here, one entry each."""
        waiting = [adapter for entry in self._queue for adapter in entry.place.claim]
        return [*waiting, *(adapter for item in self._running for adapter in item.claim)]

    def add(self, entry: Waiting) -> None:
        """Queue a request. Raises ResourceExhausted with a retry hint when the queue is full, which the engine's own work does
        not make it."""
        num_waiting = len(self._queue) if is_background(entry) else self._queue.num_clients
        if num_waiting >= self._config.max_num_waiting:
            raise ResourceExhausted(
                f"{num_waiting} requests wait already, the limit of this worker. Try again later.",
                self._retry_hint.next_s(),
            )
        self._queue.add(entry, self._running)

    def remove(self, request_id: RequestId) -> Waiting | None:
        """Take a request out, wherever it is, with what it holds; a pass goes when nobody waits for it any more."""
        for flight in list(self._flights.values()):
            flight.interested.discard(request_id)
            if not flight.interested:
                self.finish(flight)
        entry = self._queue.find(request_id)
        if entry is not None:
            self._claims.let_go(entry)
            self._leave_queue(entry)
            return entry
        for item in self._running:
            if isinstance(item, Turn) and item.request_id == request_id:
                self.finish(item)
                return item
        return None

    def finish(self, item: Runnable) -> None:
        """The item runs no more: release its lease and its slots. What it has computed stays cached."""
        self._running.remove(item)
        if isinstance(item, ContextPass):
            del self._flights[item.flight]
            self._kv.release_context(item.lease, is_cold=item.is_cold)
            self._tiers.unpin(item.claim)
            return
        self._claims.let_go(item)
        if item.lease is not None:
            self._kv.release(item.lease, is_cold=item.is_cold)
            item.lease = None

    def fail_load(self, adapter: LoadedAdapter) -> list[Waiting]:
        """Its weights could not be read. Takes out those that were waiting to run with it."""
        failed = self._claims.fail_load(adapter, self._queue)
        for entry in failed:
            self._leave_queue(entry)
        return failed

    # --- one step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The work of one step."""
        plan = StepPlan()
        budget = self._schedule_decodes(plan, self._config.max_num_batched_tokens, of_background=False)
        if plan.work:
            budget = min(budget, self._config.max_prefill_tokens_beside_decodes)
        budget = self._schedule_prefills(plan, budget, of_background=False)
        budget, is_open = self._admit(plan, budget, of_background=False)
        if is_open:
            self._schedule_background(plan, budget)
        return plan

    def _schedule_background(self, plan: StepPlan, budget: int) -> None:
        """What clients have left; not at all while one of them waits for memory."""
        if plan.work:
            budget = min(budget, self._config.max_background_tokens)
        budget = self._schedule_decodes(plan, budget, of_background=True)
        budget = self._schedule_prefills(plan, budget, of_background=True)
        self._admit(plan, budget, of_background=True)

    def _schedule_decodes(self, plan: StepPlan, budget: int, *, of_background: bool) -> int:
        decodes: list[Scheduled] = []
        for item in list(self._running):
            is_decode = isinstance(item, Turn) and item.lease is not None and item.num_uncomputed == 1
            is_due = is_decode and is_background(item) == of_background
            if budget > 0 and isinstance(item, Turn) and is_due and self._grow(item):
                decodes.append(Scheduled(item, item.num_computed, item.num_tokens))
                budget -= 1
        # Growing one turn may have preempted another that is counted already, of the same kind: background goes first.
        decodes = [s for s in decodes if isinstance(s.item, Turn) and s.item.lease is not None]
        for scheduled in decodes:
            self._queue.charge(scheduled.item.tenant, 1)
        plan.work += decodes
        return budget

    def _prefills(self, plan: StepPlan, *, of_background: bool) -> list[Runnable]:
        """Prompts under way that have no chunk in this step yet, who goes on first first."""
        planned = {id(s.item) for s in plan.work}
        prefills = [item for item in self._running if id(item) not in planned and is_background(item) == of_background]
        return sorted(prefills, key=lambda item: (item.order[0], self._queue.served(item.tenant), item.order[1]))

    def _schedule_prefills(self, plan: StepPlan, budget: int, *, of_background: bool) -> int:
        level: int | None = None
        for item in self._prefills(plan, of_background=of_background):
            if not of_background and item.order[0] != level:
                level = item.order[0]
                budget, _ = self._admit(plan, budget, of_background=False, better_than=level)
            if budget <= 0:
                break
            budget -= self._schedule_chunk(plan, item, budget)
        return budget

    def _schedule_chunk(self, plan: StepPlan, item: Runnable, budget: int) -> int:
        end = min(item.num_tokens, item.num_computed + budget)
        plan.work.append(Scheduled(item, item.num_computed, end))
        num_rows = end - item.num_computed
        self._queue.charge(item.tenant, num_rows)
        return num_rows

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
            self._queue.add(item, self._running)

    # --- admission --------------------------------------------------------------------------------------------------

    def _admit(self, plan: StepPlan, budget: int, *, of_background: bool, better_than: int | None = None) -> tuple[int, bool]:
        """Start what may start within ``budget`` tokens. ``better_than``: only requests of a better priority than this one, and
        of those none whose prefix is being computed.

        Returns tokens that are left, and False when somebody waits whom nobody may overtake.
        """
        if better_than is not None and not self._queue.has_better(better_than):
            return budget, True
        if not of_background:
            self._claims.begin_admission()
        for entry in self._queue.candidates():
            if is_background(entry) != of_background:
                continue
            if better_than is not None and entry.order[0] >= better_than:
                break
            if better_than is not None and self._is_prefix_computed_for(entry):
                plan.held.add(entry.request_id)
            if entry.request_id in plan.held:
                continue
            if budget <= 0 or not self._has_place(entry):
                return budget, False
            started = self._start(entry, plan)
            while started in (Outcome.NO_ROOM, Outcome.NO_SLOT) and self._make_way(entry):
                started = self._start(entry, plan)
            if started is Outcome.NO_ROOM:
                self._claims.let_go(entry)
                return budget, False
            if started is Outcome.NO_SLOT:
                self._claims.note_no_slot(entry)
            elif isinstance(started, Turn | ContextPass):
                self._claims.note_start(started.claim)
                self._running.append(started)
                budget -= self._schedule_chunk(plan, started, budget)
        return budget, True

    def _is_prefix_computed_for(self, entry: Waiting) -> bool:
        return any(is_computing_prefix_of(item, entry) for item in self._running if not is_background(item))

    def _has_place(self, entry: Waiting) -> bool:
        """Whether one more sequence may run, once background has made way."""
        return len(self._running) < self._config.max_num_seqs or self._make_way(entry)

    def _make_way(self, entry: Waiting) -> bool:
        """Preempt the youngest background item for a client's request; False when there is none."""
        background = [item for item in self._running if is_background(item)]
        if is_background(entry) or not background:
            return False
        self._preempt(max(background, key=_order))
        return True

    def _start(self, entry: Waiting, plan: StepPlan) -> Runnable | Outcome:
        """What to run for ``entry`` now: itself, or a pass that it needs."""
        blocked = self._still_blocked(entry)
        if blocked is not None:
            return blocked
        if entry.needs is not None:
            restore_needs(self._kv, entry.needs)
            match, missing = match_needs(self._kv, entry.needs)
            wanted = next_pass(entry.needs, match, missing)
            if wanted is not None and wanted.flight in self._flights:
                entry.place.flight = wanted.flight
                self._flights[wanted.flight].join(entry)
                self._claims.let_go(entry)
                return Outcome.WAITS
            if isinstance(entry, Demand) or (wanted is not None and _is_own(entry, wanted)):
                note_match(entry, match)
            if wanted is not None:
                return self._start_pass(entry, entry.needs, wanted, plan)
        if isinstance(entry, Demand):
            self._claims.let_go(entry)
            self._leave_queue(entry)
            plan.completed.append(entry)
            return Outcome.ENDED
        return self._start_turn(entry)

    def _still_blocked(self, entry: Waiting) -> Outcome | None:
        """What can be told without looking into the cache: most of a long queue costs no more than this."""
        place = entry.place
        if not place.is_ready:
            return Outcome.WAITS
        if place.flight in self._flights:
            self._flights[place.flight].join(entry)
            return Outcome.WAITS
        place.flight = None
        return None if self._claims.can_claim(entry) else Outcome.NO_SLOT

    def _start_turn(self, turn: Turn) -> Turn | Outcome:
        blocked = self._claims.claim_turn(turn)
        if blocked is not None:
            return blocked
        lease = self._kv.open_sequence(
            turn.request.prefix,
            turn.tokens,
            turn.num_tokens,
            turn.fork_point,
            turn.residual,
            turn.max_cached,
            is_private=turn.request.is_private,
        )
        if lease is None:
            return Outcome.NO_ROOM
        self._leave_queue(turn)
        turn.place.num_overtaken = 0
        turn.open(lease)
        return turn

    def _start_pass(self, entry: Waiting, needs: ContextNeeds, wanted: PassPlan, plan: StepPlan) -> ContextPass | Outcome:
        num_wasted = entry.num_passes - len(needs.required)
        if num_wasted >= MAX_PASSES_PER_REQUEST and self._running:
            return Outcome.NO_ROOM
        if num_wasted >= 2 * MAX_PASSES_PER_REQUEST:
            self._claims.let_go(entry)
            self._leave_queue(entry)
            plan.starved.append(entry)
            return Outcome.ENDED
        blocked = self._claims.claim_pass(entry, wanted)
        if blocked is not None:
            return blocked
        claim = entry.place.claim
        required = [t for t in wanted.required if t.adapter in claim]
        optional = [t for t in wanted.optional if t.adapter in claim]
        lease = self._kv.open_context(
            needs.key, needs.tokens, needs.context_len, [t.key for t in required], [t.key for t in optional]
        )
        if lease is None:
            return Outcome.NO_ROOM
        entry.num_passes += 1
        entry.place.claim, entry.place.flight = (), wanted.flight
        item = ContextPass(
            wanted.kind,
            wanted.flight,
            lease,
            wanted.adapter,
            {t.key: t.adapter for t in (*required, *optional)},
            entry,
            _is_own(entry, wanted),
            {entry.request_id},
            lease.run_start,
            entry.order,
            claim,
        )
        self._flights[wanted.flight] = item
        return item

    def _leave_queue(self, entry: Waiting) -> None:
        self._queue.remove(entry)
        self._retry_hint.place_freed(is_queue_busy=bool(self._queue))


def _is_own(entry: Waiting, wanted: PassPlan) -> bool:
    """Whether a pass is the request's own work. A pass of another writer is a request of its own: the entry waits for it
    and then finds its pages, as every other branch does."""
    return isinstance(entry, Demand) or (wanted.adapter is not None and wanted.adapter is entry.adapter)


def _order(item: Runnable) -> tuple[int, int]:
    return item.order
