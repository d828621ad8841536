"""Sessions, turns, joins and adapters over fake workers."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from forkkv_cluster.core.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from forkkv_cluster.core.request import FinishReason, Priority, SamplingParams, Sharing
from forkkv_cluster.core.session import BranchSpec, JoinWhat, Session
from forkkv_cluster.core.verdict import SharingVerdict, VerdictState
from forkkv_cluster.gateway.commands import (
    BranchTarget,
    CreateSessionCommand,
    GenerateCommand,
    SamplingChoice,
    StatelessTarget,
    TextOrTokens,
    TurnDelta,
    TurnEvent,
    TurnFinished,
    TurnStarted,
)
from forkkv_cluster.gateway.service import GatewayService
from forkkv_cluster.gateway.session_store import MemorySessionStore
from forkkv_cluster.testing.manual_clock import ManualClock
from tests.gateway.fakes import BOS, MODEL, FakePool, adapter_info, make_service

CREATE = CreateSessionCommand(TextOrTokens(text="the shared context"), ("planner", "critic"), Sharing.EAGER)


def turn(session: Session, branch: str = "p", text: str = "hi", **changes: object) -> GenerateCommand:
    sampling = SamplingChoice(SamplingParams(), max_tokens=4)
    values = {"target": BranchTarget(session.session_id, branch), "input": TextOrTokens(text=text), "sampling": sampling}
    return GenerateCommand(**{**values, **changes})  # type: ignore[arg-type]


async def run(service: GatewayService, command: GenerateCommand, caller: str | None = None) -> list[TurnEvent]:
    return [event async for event in service.generate(caller, command)]


async def forked(service: GatewayService, caller: str | None = None, create: CreateSessionCommand = CREATE) -> Session:
    session = await service.create_session(caller, create)
    await service.fork(caller, session.session_id, (BranchSpec("p", "planner"), BranchSpec("c", "critic")), None)
    return session


async def own(service: GatewayService, session: Session, branch: str = "p") -> list[int]:
    return (await service.get_session(None, session.session_id)).branch(branch).own.tolist()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_session_is_stored_and_its_context_pass_runs_behind() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await service.create_session(None, CREATE)
    assert session.context.tolist() == [BOS, *b"the shared context"]
    assert (session.tenant, session.sharing) == ("default", Sharing.EAGER)
    await settle()
    (context_pass,) = pool.contexts
    assert context_pass.tokens.tolist() == session.context.tolist()
    assert [adapter.name for adapter in context_pass.declared] == ["planner", "critic"]


async def test_a_session_that_names_no_sharing_shares_nothing_until_a_measurement_allows_it() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service, create=CreateSessionCommand(CREATE.context, CREATE.adapters))
    assert session.sharing is Sharing.AUTO
    events = await run(service, turn(session))
    assert isinstance(events[-1], TurnFinished)
    assert events[-1].sharing is Sharing.ISOLATED
    await settle()
    assert pool.contexts == []


async def test_a_session_that_is_to_be_kept_says_so_with_each_pass_and_until_it_is_closed() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service, create=replace(CREATE, keep_s=30.0))
    await run(service, turn(session))
    await service.join(None, session.session_id, "p", JoinWhat.ALL)
    await settle()
    assert [context_pass.keep_s for context_pass in pool.contexts] == [30.0, 30.0]
    assert pool.released_hints == []
    await service.close_session(None, session.session_id)
    await settle()
    assert pool.released_hints == [session.session_id]


async def test_what_only_one_branch_needs_is_not_kept() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service, create=replace(CREATE, keep_s=30.0))
    await run(service, turn(session))
    await service.fork(None, session.session_id, (BranchSpec("q", "critic"),), "p")
    await settle()
    assert [context_pass.keep_s for context_pass in pool.contexts] == [30.0, 0.0]


async def test_a_time_to_keep_that_makes_no_sense_makes_no_session() -> None:
    service = make_service(FakePool())
    with pytest.raises(InvalidArgument, match="keep_s"):
        await service.create_session(None, replace(CREATE, keep_s=-1.0))
    assert await service.list_sessions(None) == []


async def test_a_session_that_is_not_kept_releases_nothing() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await service.create_session(None, CREATE)
    await service.close_session(None, session.session_id)
    await settle()
    assert pool.released_hints == []


async def test_an_isolated_session_has_no_context_pass() -> None:
    pool = FakePool()
    await make_service(pool).create_session(None, CreateSessionCommand(CREATE.context, ("planner",), Sharing.ISOLATED))
    await settle()
    assert pool.contexts == []


async def test_the_first_writer_needs_no_context_pass() -> None:
    pool = FakePool()
    command = CreateSessionCommand(CREATE.context, ("planner",), Sharing.RESIDUAL)
    await make_service(pool, config={"defaults": {"writer": "first"}}).create_session(None, command)
    await settle()
    assert pool.contexts == []


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (CreateSessionCommand(TextOrTokens(token_ids=[])), InvalidArgument),
        (CreateSessionCommand(TextOrTokens(token_ids=[1, -1])), InvalidArgument),
        (CreateSessionCommand(TextOrTokens(token_ids=[1, MODEL.vocab_size])), InvalidArgument),
        (CreateSessionCommand(TextOrTokens(token_ids=[1] * MODEL.max_model_len)), InvalidArgument),
        (CreateSessionCommand(CREATE.context, ("nobody",)), NotFound),
    ],
)
async def test_a_bad_session_is_refused_and_not_stored(command: CreateSessionCommand, error: type[Exception]) -> None:
    service = make_service(FakePool())
    with pytest.raises(error):
        await service.create_session(None, command)
    assert await service.list_sessions(None) == []


async def test_a_turn_is_stored_when_its_last_event_arrives() -> None:
    service = make_service(FakePool())
    session = await forked(service)
    events = await run(service, turn(session))
    assert isinstance(events[0], TurnStarted)
    assert isinstance(events[-1], TurnFinished)
    assert await own(service, session) == [*b"hi", *b"abcd"]


async def test_the_next_turn_goes_on_from_the_last() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service)
    await run(service, turn(session))
    await run(service, turn(session, text="!"))
    second = pool.generated[-1]
    assert second.tokens.tolist() == [*session.context.tolist(), *b"hiabcd!"]
    assert second.context_len == len(session.context)


async def test_a_branchs_first_turn_needs_a_token() -> None:
    service = make_service(FakePool())
    session = await forked(service)
    with pytest.raises(InvalidArgument, match="append"):
        await run(service, turn(session, text=""))


async def test_a_later_turn_may_append_nothing() -> None:
    service = make_service(FakePool())
    session = await forked(service)
    await run(service, turn(session))
    await run(service, turn(session, text=""))
    assert len(await own(service, session)) == 2 + 4 + 4


async def test_a_cancelled_turn_leaves_the_branch_as_it_was() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service)
    async with aclosing(service.generate(None, turn(session))) as events:
        async for event in events:
            if isinstance(event, TurnDelta):
                break
    assert await own(service, session) == []
    assert (pool.num_open, pool.num_cancelled) == (0, 1)
    await run(service, turn(session))


async def test_a_failed_turn_leaves_the_branch_as_it_was() -> None:
    service = make_service(FakePool(errors=[ResourceExhausted("full", 1.0)]))
    session = await forked(service)
    with pytest.raises(ResourceExhausted):
        await run(service, turn(session))
    assert await own(service, session) == []
    await run(service, turn(session))


async def test_a_busy_branch_aborts_turns_and_refuses_joins_closes_and_forks() -> None:
    pool = FakePool(gate=asyncio.Event())
    service = make_service(pool)
    session = await forked(service)
    running = asyncio.create_task(run(service, turn(session)))
    await pool.opened.wait()
    with pytest.raises(Aborted):
        await run(service, turn(session))
    with pytest.raises(FailedPrecondition):
        await service.join(None, session.session_id, "p", JoinWhat.ALL)
    with pytest.raises(FailedPrecondition):
        await service.close_session(None, session.session_id)
    with pytest.raises(FailedPrecondition):
        await service.fork(None, session.session_id, (BranchSpec("child"),), "p")
    pool.gate.set()  # type: ignore[union-attr]
    await running
    assert len(await own(service, session)) == 6


async def test_branches_of_one_session_run_side_by_side() -> None:
    service = make_service(FakePool())
    session = await forked(service)
    await asyncio.gather(run(service, turn(session, "p")), run(service, turn(session, "c")))
    assert len(await own(service, session, "p")) == len(await own(service, session, "c")) == 6


async def test_a_join_appends_and_a_new_branch_reads_it() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service)
    await run(service, turn(session))
    joined, after = await service.join(None, session.session_id, "p", JoinWhat.OUTPUT)
    assert joined == 4
    assert after.context.tolist() == [*session.context.tolist(), *b"abcd"]
    (new,) = await service.fork(None, session.session_id, (BranchSpec("new", "critic"),), None)
    assert new.context.tolist() == after.context.tolist()
    assert after.branch("c").context.tolist() == session.context.tolist()
    await settle()
    assert pool.contexts[-1].tokens.tolist() == after.context.tolist()


async def test_a_second_join_appends_only_what_is_new() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service)
    await run(service, turn(session))
    await service.join(None, session.session_id, "p", JoinWhat.ALL)
    assert (await service.join(None, session.session_id, "p", JoinWhat.ALL))[0] == 0
    await settle()
    assert len(pool.contexts) == 2


async def test_another_adapter_forks_a_branchs_own_tokens_as_context() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service)
    await run(service, turn(session))
    same, other = await service.fork(
        None, session.session_id, (BranchSpec("same", "planner"), BranchSpec("other", "critic")), "p"
    )
    assert (len(same.context), len(same.own)) == (len(session.context), 6)
    assert (len(other.context), len(other.own)) == (len(session.context) + 6, 0)
    await settle()
    assert pool.contexts[-1].tokens.tolist() == other.context.tolist()


async def test_a_name_is_taken_once_and_a_failed_fork_makes_nothing() -> None:
    service = make_service(FakePool())
    session = await forked(service)
    with pytest.raises(AlreadyExists):
        await service.fork(None, session.session_id, (BranchSpec("new", "planner"), BranchSpec("p", "planner")), None)
    with pytest.raises(InvalidArgument):
        await service.fork(None, session.session_id, (), None)
    assert sorted((await service.get_session(None, session.session_id)).branches) == ["c", "p"]


async def test_a_session_of_another_tenant_does_not_exist() -> None:
    service = make_service(FakePool(), config={"gateway": {"session_store": "memory:", "api_tokens": {"t": "a", "u": "b"}}})
    session = await forked(service, "a")
    for attempt in (
        service.get_session("b", session.session_id),
        service.close_session("b", session.session_id),
        service.fork("b", session.session_id, (BranchSpec("x"),), None),
        service.join("b", session.session_id, "p", JoinWhat.ALL),
        run(service, turn(session), "b"),
    ):
        with pytest.raises(NotFound, match="session"):
            await attempt
    assert await service.list_sessions("b") == []
    assert [s.session_id for s in await service.list_sessions("a")] == [session.session_id]


async def test_a_stateless_request_runs_alone() -> None:
    pool = FakePool()
    service = make_service(pool)
    command = GenerateCommand(StatelessTarget("planner"), TextOrTokens(text="hi"), SamplingChoice(max_tokens=3))
    events = await run(service, command)
    assert isinstance(events[-1], TurnFinished)
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert pool.generated[0].tokens.tolist() == [BOS, *b"hi"]
    assert pool.generated[0].sharing is Sharing.ISOLATED


@pytest.mark.parametrize(
    "changes",
    [
        {"target": StatelessTarget("nobody")},
        {"input": TextOrTokens(token_ids=[])},
        {"input": TextOrTokens(token_ids=["x"])},
        {"timeout_s": -1.0},
        {"turn_id": "turn-1"},
        {"sampling": SamplingChoice(SamplingParams(temperature=-1.0))},
    ],
)
async def test_a_bad_stateless_request_never_reaches_a_worker(changes: dict[str, object]) -> None:
    pool = FakePool()
    service = make_service(pool)
    values: dict[str, object] = {"target": StatelessTarget(), "input": TextOrTokens(text="hi"), **changes}
    with pytest.raises((InvalidArgument, NotFound)):
        await run(service, GenerateCommand(**values))  # type: ignore[arg-type]
    assert pool.generated == []


async def test_a_seed_is_drawn_and_told() -> None:
    pool = FakePool()
    service = make_service(pool)
    command = GenerateCommand(StatelessTarget(), TextOrTokens(text="hi"))
    seeds = {(await run(service, command))[0].seed for _ in range(3)}  # type: ignore[union-attr]
    assert seeds == {request.sampling.seed for request in pool.generated}
    assert len(seeds) == 3


async def test_a_timeout_becomes_a_deadline_on_the_wall_clock() -> None:
    pool = FakePool()
    service = make_service(pool)
    await run(service, GenerateCommand(StatelessTarget(), TextOrTokens(text="hi"), timeout_s=7.0))
    assert pool.generated[0].deadline_s == pytest.approx(1_700_000_007.0)


async def test_a_named_turn_outlives_its_connection_and_is_picked_up() -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service)
    command = turn(session, turn_id="turn-1")
    async with aclosing(service.generate(None, command)) as events:
        async for event in events:
            if isinstance(event, TurnDelta):
                break
    rest = await run(service, turn(session, turn_id="turn-1", num_received_tokens=1))
    assert [event.text for event in rest if isinstance(event, TurnDelta)] == ["b", "c", "d"]
    assert len(pool.generated) == 1
    assert len(await own(service, session)) == 6


async def test_a_stored_turn_is_answered_from_the_store_and_not_run_again() -> None:
    store = MemorySessionStore()
    pool = FakePool()
    session = await forked(make_service(pool, store=store))
    await run(make_service(pool, store=store), turn(session, turn_id="turn-1"))
    replayed = await run(make_service(pool, store=store), turn(session, turn_id="turn-1", num_received_tokens=2))
    assert [event.token_ids for event in replayed if isinstance(event, TurnDelta)] == [(ord("c"),), (ord("d"),)]
    assert isinstance(replayed[-1], TurnFinished)
    assert replayed[-1].finish_reason is None
    assert len(pool.generated) == 1


OTHER_REQUESTS: dict[str, dict[str, object]] = {
    "another input": {"text": "ho"},
    "another temperature": {"sampling": SamplingChoice(SamplingParams(temperature=0.5), max_tokens=4)},
    "another seed": {"sampling": SamplingChoice(SamplingParams(), seed=7, max_tokens=4)},
    "another length": {"sampling": SamplingChoice(SamplingParams(), max_tokens=3)},
    "another stop": {"sampling": SamplingChoice(SamplingParams(stop=("c",)), max_tokens=4)},
}


@pytest.mark.parametrize("changes", OTHER_REQUESTS.values(), ids=OTHER_REQUESTS)
async def test_a_known_turn_id_with_another_request_is_refused_while_it_is_in_memory(changes: dict[str, Any]) -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service)
    await run(service, turn(session, turn_id="turn-1"))
    with pytest.raises(FailedPrecondition, match="turn_id"):
        await run(service, turn(session, turn_id="turn-1", **changes))
    assert len(pool.generated) == 1


@pytest.mark.parametrize("changes", OTHER_REQUESTS.values(), ids=OTHER_REQUESTS)
async def test_a_known_turn_id_with_another_request_is_refused_once_it_is_stored(changes: dict[str, Any]) -> None:
    store, pool = MemorySessionStore(), FakePool()
    session = await forked(make_service(pool, store=store))
    await run(make_service(pool, store=store), turn(session, turn_id="turn-1"))
    with pytest.raises(FailedPrecondition, match="turn_id"):
        await run(make_service(pool, store=store), turn(session, turn_id="turn-1", **changes))
    assert len(pool.generated) == 1


async def test_a_retry_may_have_another_deadline_and_priority() -> None:
    store, pool = MemorySessionStore(), FakePool()
    session = await forked(make_service(pool, store=store))
    for service in (make_service(pool, store=store), make_service(pool, store=store)):
        await run(service, turn(session, turn_id="turn-1"))
        await run(service, turn(session, turn_id="turn-1", timeout_s=9.0, priority=Priority.HIGH))
    assert len(pool.generated) == 1


@pytest.mark.parametrize("is_branch", [True, False])
async def test_tokens_received_of_a_turn_without_an_id_are_refused_before_anything_runs(is_branch: bool) -> None:
    pool = FakePool()
    service = make_service(pool)
    session = await forked(service)
    command = turn(session, num_received_tokens=1)
    with pytest.raises(InvalidArgument, match="turn_id"):
        await run(service, command if is_branch else replace(command, target=StatelessTarget()))
    assert pool.generated == []


class SlowStore(MemorySessionStore):
    """Whoever reads while ``gate`` is closed gets what was true before the wait, as over a network."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: asyncio.Event | None = None

    async def get(self, session_id: str) -> Session:
        session = await super().get(session_id)
        if self.gate is not None:
            await self.gate.wait()
        return session


async def test_a_turn_goes_on_from_a_turn_that_ended_while_it_was_being_looked_up() -> None:
    pool, store = FakePool(), SlowStore()
    service = make_service(pool, store=store)
    session = await forked(service)
    gate = store.gate = asyncio.Event()
    late = asyncio.create_task(run(service, turn(session, text="!")))
    await settle()
    store.gate = None
    await run(service, turn(session))
    gate.set()
    await late
    assert pool.generated[-1].tokens.tolist() == [*session.context.tolist(), *b"hiabcd!"]
    assert len(await own(service, session)) == 2 + 4 + 1 + 4


async def test_more_tokens_than_the_turn_has_cannot_have_been_received() -> None:
    service = make_service(FakePool())
    session = await forked(service)
    with pytest.raises(InvalidArgument, match="num_received_tokens"):
        await run(service, turn(session, turn_id="turn-1", num_received_tokens=9))


async def test_a_turn_that_another_gateway_overtook_is_aborted() -> None:
    pool = FakePool(gate=asyncio.Event())
    store = MemorySessionStore()
    service = make_service(pool, store=store)
    session = await forked(service)
    running = asyncio.create_task(run(service, turn(session)))
    await pool.opened.wait()
    one = np.asarray([1], dtype=np.int32)
    await store.update(session.session_id, lambda state: state.finish_turn("p", one, one))
    pool.gate.set()  # type: ignore[union-attr]
    with pytest.raises(Aborted, match="another turn"):
        await running
    assert await own(service, session) == [1, 1]


async def test_an_adapter_is_loaded_listed_and_forgotten() -> None:
    service = make_service(FakePool())
    info = await service.load_adapter("coder", "/adapters/coder")
    assert [known.name for known in await service.list_adapters()] == ["coder", "critic", "planner"]
    assert (await service.resolve_adapter("coder")) is not None
    await service.unload_adapter("coder")
    with pytest.raises(NotFound, match="coder"):
        await service.resolve_adapter("coder")
    assert info == adapter_info("coder")


async def test_an_adapter_that_a_worker_refuses_is_not_registered() -> None:
    pool = FakePool(fail_loading=InvalidArgument("path", "/x", "holds no adapter", "Name a PEFT directory."))
    service = make_service(pool)
    with pytest.raises(InvalidArgument, match="holds no adapter"):
        await service.load_adapter("coder", "/x")
    with pytest.raises(NotFound):
        await service.resolve_adapter("coder")


async def test_an_adapter_loaded_before_survives_a_new_gateway_and_new_workers() -> None:
    store = MemorySessionStore()
    await make_service(FakePool(), store=store).load_adapter("coder", "/adapters/coder")
    fresh = FakePool(missing={"coder"})
    service = make_service(fresh, store=store)
    events = await run(
        service, GenerateCommand(StatelessTarget("coder"), TextOrTokens(text="hi"), SamplingChoice(max_tokens=2))
    )
    assert isinstance(events[-1], TurnFinished)
    assert "coder" in fresh.adapters


async def test_status_counts_sessions_and_branches() -> None:
    service = make_service(FakePool())
    await forked(service)
    status = await service.status()
    assert (status.version, status.num_sessions, status.num_branches, len(status.workers)) == ("1.2.3", 1, 2, 1)
    assert status.directory is None


# --- auto -------------------------------------------------------------------------------------------------------------

AUTO = replace(CREATE, sharing=Sharing.AUTO)


def judged(pool: FakePool, **modes: Sharing) -> None:
    """The worker has measured: ``auto`` comes to that on these adapters."""
    for name in ("planner", "critic"):
        pool.adapters.setdefault(name, adapter_info(name))
    for name, sharing in modes.items():
        verdict = SharingVerdict(sharing, VerdictState.MEASURED, Sharing.ISOLATED, "measured")
        pool.adapters[name] = replace(adapter_info(name), verdict=verdict)


async def contexts_of(pool: FakePool) -> list[tuple[Sharing, list[str]]]:
    for _ in range(8):
        await asyncio.sleep(0)
    return [(request.sharing, [adapter.name for adapter in request.declared]) for request in pool.contexts]


async def test_under_auto_each_branch_is_served_as_its_adapter_was_measured_and_the_turn_says_how() -> None:
    pool = FakePool()
    judged(pool, planner=Sharing.EAGER, critic=Sharing.ISOLATED)
    service = make_service(pool)
    session = await forked(service, create=AUTO)
    assert (session.sharing, await contexts_of(pool)) == (Sharing.AUTO, [(Sharing.EAGER, ["planner"])])
    ends = [(await run(service, turn(session, branch)))[-1] for branch in ("p", "c")]
    assert [end.sharing for end in ends if isinstance(end, TurnFinished)] == [Sharing.EAGER, Sharing.ISOLATED]
    planner, critic = pool.generated
    assert (planner.sharing, planner.context_len, [ref.name for ref in planner.declared]) == (
        Sharing.EAGER,
        len(session.context),
        ["planner"],
    )
    assert (critic.sharing, critic.context_len) == (Sharing.ISOLATED, 0)


async def test_under_auto_no_pass_runs_over_a_context_that_nobody_would_read() -> None:
    pool = FakePool()
    judged(pool, planner=Sharing.ISOLATED)
    service = make_service(pool)
    await forked(service, create=AUTO)
    assert await contexts_of(pool) == []


async def test_a_branch_goes_on_isolated_when_its_adapter_falls_back() -> None:
    pool, clock = FakePool(), ManualClock()
    judged(pool, planner=Sharing.EAGER)
    service = make_service(pool, clock=clock)
    session = await forked(service, create=AUTO)
    await run(service, turn(session))
    judged(pool, planner=Sharing.ISOLATED)
    clock.advance(60)
    await run(service, turn(session, text="more"))
    assert [request.sharing for request in pool.generated] == [Sharing.EAGER, Sharing.ISOLATED]
    assert pool.generated[1].num_tokens > pool.generated[0].num_tokens + 4  # with the history of the first turn


async def test_a_stream_that_is_resumed_keeps_the_sharing_that_it_began_with() -> None:
    pool = FakePool(die_after=[2])
    judged(pool, planner=Sharing.EAGER)
    service = make_service(pool)
    session = await forked(service, create=AUTO)
    await run(service, turn(session))
    assert [request.sharing for request in pool.generated] == [Sharing.EAGER, Sharing.EAGER]


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (StatelessTarget("planner", Sharing.AUTO, 3), (Sharing.EAGER, 3)),
        (StatelessTarget("planner", Sharing.AUTO), (Sharing.ISOLATED, 0)),
        (StatelessTarget("critic", Sharing.AUTO, 3), (Sharing.ISOLATED, 0)),
    ],
)
async def test_a_request_without_a_session_may_ask_for_auto(target: StatelessTarget, wanted: tuple[Sharing, int]) -> None:
    pool = FakePool()
    judged(pool, planner=Sharing.EAGER, critic=Sharing.ISOLATED)
    command = GenerateCommand(target, TextOrTokens(text="hello"), SamplingChoice(max_tokens=2))
    await run(make_service(pool), command)
    (request,) = pool.generated
    assert (request.sharing, request.context_len) == wanted


async def test_an_adapter_is_loaded_with_a_sharing_that_outlives_gateways_and_workers() -> None:
    store = MemorySessionStore()
    info = await make_service(FakePool(), store=store).load_adapter("coder", "/adapters/coder", Sharing.AUTO)
    assert info.sharing is Sharing.AUTO
    fresh = FakePool(missing={"coder"})
    await run(
        make_service(fresh, store=store),
        GenerateCommand(StatelessTarget("coder"), TextOrTokens(text="hi"), SamplingChoice(max_tokens=2)),
    )
    assert fresh.adapters["coder"].sharing is Sharing.AUTO


async def test_lists_and_status_say_how_auto_is_served_and_the_store_does_not_keep_it() -> None:
    pool, store = FakePool(), MemorySessionStore()
    service = make_service(pool, store=store)
    judged(pool, planner=Sharing.EAGER)
    listed = {info.name: info.verdict for info in await service.list_adapters()}
    shown = {info.name: info.verdict for info in (await service.status()).adapters}
    assert listed == shown
    assert (listed["planner"] is not None, listed["critic"]) == (True, None)
    judged(pool, late=Sharing.EAGER)
    await service.load_adapter("late", "/adapters/late")
    assert (await store.adapters())["late"].verdict is None
