"""A soak: random agents on an engine with too little memory, and what must hold whatever they do.

Everything follows from the seed: choices come from one generator, deadlines run on a clock that each step moves on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from forkkv_cluster.bench.soak_adapters import AdapterChurn
from forkkv_cluster.bench.soak_agents import Agents
from forkkv_cluster.bench.soak_events import EventMirror
from forkkv_cluster.bench.soak_ledger import Ask, Flight, Ledger, SoakFailure
from forkkv_cluster.bench.soak_malformed import MALFORMED
from forkkv_cluster.bench.soak_plan import SoakPlan
from forkkv_cluster.bench.soak_replay import Replay, is_replayable
from forkkv_cluster.core.config import SchedulerConfig
from forkkv_cluster.core.errors import AlreadyExists, ForkKVError, Internal, NotFound, ResourceExhausted
from forkkv_cluster.core.request import ContextRequest
from forkkv_cluster.core.request_builder import RequestBuilder
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.testing.manual_clock import ManualClock

MAX_DRAIN_STEPS = 5000


class SoakDriver:
    """One engine under load. ``clock`` is the engine's own; ``fresh_engine`` makes one for the spot checks.

    ``round`` asks and steps once, ``settle`` drains and checks. Both raise SoakFailure.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: SchedulerConfig,
        fresh_engine: Callable[[], Engine],
        plan: SoakPlan,
        clock: ManualClock,
        seed: int,
    ) -> None:
        self.engine = engine
        self.plan = plan
        self.clock = clock
        self.num_rounds = 0
        self.actions: Counter[str] = Counter()
        self.checks: Counter[str] = Counter()
        self._scheduler = scheduler
        self._rng = random.Random(seed)
        self._adapters = AdapterChurn(engine, plan.adapters, self._rng)
        builder = RequestBuilder(engine.model_info, block_size=plan.page_size, namespace_of="soak:{}:{}".format)
        self._agents = Agents(plan, builder, self._adapters, clock, self._rng)
        self.ledger = Ledger(engine.model_info)
        self.replay = Replay(fresh_engine, builder, self._adapters.paths)
        self._mirror = EventMirror()
        self._samples: list[Flight] = []
        self._num_sampled = 0
        self._table: tuple[tuple[int, str, Callable[[], None]], ...] = (
            (60, "turn", lambda: self._add_to(self._agents.turn)),
            (10, "prompt", lambda: self._add_to(self._agents.prompt)),
            (6, "open a session", lambda: self._add_to(self._agents.open_session)),
            (2, "close a session", self._agents.close_session),
            (20, "fork", self._agents.fork),
            (6, "join", lambda: self._add_to(self._agents.join)),
            (8, "cancel", self._cancel),
            (4, "interrupt and resume", self._interrupt),
            (4, "malformed request", self._malformed),
            (1, "id in use", self._id_in_use),
            (1, "reload an adapter", self._adapters.reload),
            (1, "unload an adapter", self._adapters.unload),
            (2, "load an adapter", self._adapters.load),
            (1, "load over a name", self._adapters.load_again),
            (1, "unload an unknown name", self._adapters.unload_unknown),
            (1, "burst", self._burst),
            (1, "let time pass", lambda: self.clock.advance(60.0)),
        )

    # --- the load ---------------------------------------------------------------------------------------------------

    def round(self) -> None:
        """Some random actions, one step of the engine, and what that step has to keep."""
        self.num_rounds += 1
        for _ in range(self._rng.choice((0, 1, 1, 2, 4))):
            ((_, name, act),) = self._rng.choices(self._table, [weight for weight, _, _ in self._table])
            self.actions[name] += 1
            act()
        self._step()
        if self.num_rounds % 8 == 0:
            self._check_invariants()

    def settle(self) -> None:
        """Let everything end, then check all that must hold of an idle engine, and sampled outputs."""
        for _ in range(MAX_DRAIN_STEPS):
            if not self.engine.has_work:
                break
            self._step()
        else:
            raise SoakFailure("everything ends", f"still busy after {MAX_DRAIN_STEPS} steps: {self.engine.status()}")
        self._check("one terminal result", self.ledger.check_settled)
        self._check_invariants()
        self._check("idle engine", self._check_idle)
        self._check("adapter references", self._adapters.check_idle)
        self._check("adapter references", self._adapters.check_droppable)
        self._step()
        self._check("events", lambda: self._mirror.check(self.engine.snapshot_events()))
        samples, self._samples, self._num_sampled = self._samples, [], 0
        for flight in samples:
            self._check("outputs", lambda flight=flight: self.replay.check(flight))  # type: ignore[misc]

    def _step(self) -> None:
        self.clock.advance(self.plan.step_s)
        now_s = self.clock.wall()
        try:
            output = self.engine.step()
        except Exception as error:  # of whatever kind: a step raises nothing
            raise SoakFailure("the engine runs on", f"step raised {error!r}") from error
        self._mirror.take(output.events)
        for flight in self.ledger.take(output, now_s):
            self._end(flight)

    def _end(self, flight: Flight) -> None:
        again = self._agents.resumed(flight) if flight.is_interrupted and flight.error is not None and flight.tokens else None
        if again is not None:
            self._add(again)
            return
        self._agents.finish(flight)
        if is_replayable(flight):
            self._sample(flight)

    def _sample(self, flight: Flight) -> None:
        """A reservoir: every request since the last check is equally likely to be run again."""
        self._num_sampled += 1
        if len(self._samples) < self.plan.replays:
            self._samples.append(flight)
        elif (place := self._rng.randrange(self._num_sampled)) < self.plan.replays:
            self._samples[place] = flight

    # --- actions ----------------------------------------------------------------------------------------------------

    def _add_to(self, make: Callable[[], Ask | None]) -> None:
        if len(self.ledger.live) < self.plan.max_live and (ask := make()) is not None:
            self._add(ask)

    def _burst(self) -> None:
        """More than the queue takes: the rest is refused."""
        for _ in range(self._scheduler.max_num_waiting + 4):
            self._add(self._agents.prompt())

    def _add(self, ask: Ask) -> None:
        """Raises SoakFailure when a sound request is refused for no good reason."""
        try:
            self.engine.add_request(ask.request)
        except NotFound as refused:
            self._agents.release(ask)
            self._agents.forget(ask.request.session_id)
            self._check_refusal(not self._has_adapters(ask), refused)
            self.actions["refused: adapter is gone"] += 1
        except ResourceExhausted as refused:
            self._agents.release(ask)
            is_full = self.engine.status().num_waiting >= self._scheduler.max_num_waiting
            self._check_refusal(is_full and refused.retry_after_s > 0, refused)
            self.actions["refused: overload"] += 1
        except ForkKVError as refused:
            late = ask.request.deadline_s is not None and ask.request.deadline_s <= self.clock.wall()
            self._agents.release(ask)
            self._check_refusal(late, refused)
        else:
            self.ledger.accept(ask)

    def _has_adapters(self, ask: Ask) -> bool:
        request = ask.request
        if isinstance(request, ContextRequest):
            return True
        return all(self._adapters.is_loaded(ref) for ref in (request.adapter, request.writer) if ref is not None)

    def _check_refusal(self, is_right: bool, refused: ForkKVError) -> None:
        self.checks["refusals"] += 1
        if not is_right:
            raise SoakFailure("refusals", f"a sound request was refused: {refused!r}")

    def _cancel(self) -> None:
        flight = self._any_live()
        self.engine.abort(flight.request.request_id if flight is not None else "never-asked")  # type: ignore[arg-type]
        if flight is not None:
            flight.is_aborted = True

    def _interrupt(self) -> None:
        """As when a worker dies: what has come so far is resumed."""
        flight = self._any_live()
        if flight is not None and not flight.is_aborted:
            flight.is_aborted = flight.is_interrupted = True
            self.engine.abort(flight.request.request_id)

    def _any_live(self) -> Flight | None:
        return self._rng.choice(list(self.ledger.live.values())) if self.ledger.live else None

    def _malformed(self) -> None:
        what, spoil, error = self._rng.choice(MALFORMED)
        self._refuse(what, Ask(spoil(self._agents.sound_request(), self.engine.model_info)), error)

    def _id_in_use(self) -> None:
        if (flight := self._any_live()) is not None:
            self._refuse("an id in use", flight.ask, AlreadyExists)

    def _refuse(self, what: str, ask: Ask, error: type[ForkKVError]) -> None:
        self.checks["malformed requests"] += 1
        try:
            self.engine.add_request(ask.request)
        except error:
            return
        except ForkKVError as other:
            raise SoakFailure("malformed requests", f"{what} was refused as {other!r}, not {error.__name__}") from None
        raise SoakFailure("malformed requests", f"{what} was accepted")

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check(self, name: str, check: Callable[[], None]) -> None:
        self.checks[name] += 1
        check()

    def _check_invariants(self) -> None:
        self.checks["invariants"] += 1
        try:
            self.engine.check_invariants()
        except Internal as broken:
            raise SoakFailure("invariants", broken.message) from None

    def _check_idle(self) -> None:
        status = self.engine.status()
        held = (status.num_running, status.num_waiting, status.num_pinned_pages, self._agents.check_idle())
        if any(held):
            raise SoakFailure("idle engine", f"running, waiting, pinned pages, busy branches: {held}")
        for pool in status.pools:
            if pool.num_free + pool.num_cached != pool.num_total:
                raise SoakFailure("idle engine", f"{pool.name}: {pool.num_free} free + {pool.num_cached} cached pages "
                                  f"are not {pool.num_total}")  # fmt: skip
        load = self.engine.load()
        if load.num_active or load.free_bytes != load.total_bytes:
            raise SoakFailure("idle engine", f"load says {load}")
