"""aLoRA at the gateway: the fork point goes down with the request, and the answer says when the adapter did not run."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from forkkv_cluster.core.request import AdapterInfo, Sharing
from forkkv_cluster.core.session import BranchSpec, Session
from forkkv_cluster.gateway.commands import (
    BranchTarget,
    CreateSessionCommand,
    GenerateCommand,
    SamplingChoice,
    StatelessTarget,
    TextOrTokens,
    TurnFinished,
)
from forkkv_cluster.gateway.openai_api import build_http_app
from forkkv_cluster.gateway.service import GatewayService
from forkkv_cluster.gateway.session_fields import adapter_from_json, adapter_to_json, from_fields, to_fields
from forkkv_cluster.gateway.session_store import MemorySessionStore
from tests.gateway.fakes import FakePool, adapter_info, make_service

INVOCATION = tuple(b"<check>")


def alora() -> AdapterInfo:
    plain = adapter_info("checker")
    return AdapterInfo(plain.name, plain.digest, plain.path, 8, ("k_proj",), 0, invocation_tokens=INVOCATION)


@pytest.fixture
def pool() -> FakePool:
    return FakePool(adapters={"checker": alora(), "planner": adapter_info("planner")})


async def forked(service: GatewayService, adapter: str = "checker") -> Session:
    command = CreateSessionCommand(TextOrTokens("a shared context"), ("checker", "planner"), Sharing.EAGER)
    session = await service.create_session(None, command)
    await service.fork(None, session.session_id, (BranchSpec("b", adapter),), None)
    return session


async def finished(
    service: GatewayService, target: BranchTarget | StatelessTarget, text: str, turn_id: str = ""
) -> TurnFinished:
    command = GenerateCommand(target, TextOrTokens(text), SamplingChoice(max_tokens=4), turn_id=turn_id)
    events = [event async for event in service.generate(None, command)]
    assert isinstance(events[-1], TurnFinished)
    return events[-1]


async def test_a_turn_forks_where_it_is_invoked(pool: FakePool) -> None:
    service = make_service(pool)
    session = await forked(service)
    end = await finished(service, BranchTarget(session.session_id, "b"), "hm <check>ok")
    (request,) = pool.generated
    start = len(session.context) + len("hm ")
    assert (request.invocation_start, request.context_len) == (start, len(session.context))
    assert len(request.prefix.context) == start // 4
    assert not end.is_adapter_inactive


async def test_a_later_turn_is_searched_as_a_whole_and_again(pool: FakePool) -> None:
    service = make_service(pool)
    session = await forked(service)
    target, starts = BranchTarget(session.session_id, "b"), []
    for text in ("<check>ok", "more", "<check>"):
        await finished(service, target, text)
        starts.append(pool.generated[-1].invocation_start)
    first = len(session.context)
    assert starts == [first, first, first + len("<check>ok") + 4 + len("more") + 4]


async def test_a_request_without_invocation_runs_the_base_model_and_says_so(pool: FakePool) -> None:
    service = make_service(pool)
    session = await forked(service)
    for target in (BranchTarget(session.session_id, "b"), StatelessTarget("checker")):
        end = await finished(service, target, "no such thing")
        assert end.is_adapter_inactive
        assert pool.generated[-1].adapter is None
    assert not (await finished(service, StatelessTarget("planner"), "no such thing")).is_adapter_inactive


async def test_a_lost_worker_changes_neither_the_invocation_nor_a_token(pool: FakePool) -> None:
    pool.die_after = [2]
    pool.answer = b"<check> and so on"
    service = make_service(pool)
    await finished(service, StatelessTarget("checker"), "is it <check>so")
    first, second = pool.generated
    assert second.num_resumed == 2
    assert second.invocation_start == first.invocation_start
    assert second.prefix.own[: len(first.prefix.own)] == first.prefix.own
    assert second.prefix.context == first.prefix.context


async def test_a_turn_from_the_store_still_says_whether_its_adapter_ran(pool: FakePool) -> None:
    store = MemorySessionStore()
    session = await forked(make_service(pool, store=store))
    target = BranchTarget(session.session_id, "b")
    pool.answer = b"<check>"
    for turn_id, text, is_inactive in (("one", "hm", True), ("two", "hm <check>", False)):
        await finished(make_service(pool, store=store), target, text, turn_id)
        replayed = await finished(make_service(pool, store=store), target, text, turn_id)
        assert replayed.finish_reason is None
        assert replayed.is_adapter_inactive == is_inactive


async def test_http_says_so_in_usage_and_in_the_last_chunk_of_a_stream(pool: FakePool) -> None:
    service = make_service(pool)
    with TestClient(build_http_app(lambda: service)) as client:
        for prompt, is_inactive in (("hi", True), ("hi <check>", False)):
            body = {"model": "checker", "prompt": prompt, "max_tokens": 4}
            usage = client.post("/v1/completions", json=body).json()["usage"]["forkkv"]
            assert usage["is_adapter_inactive"] is is_inactive
            lines = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
            assert ('"forkkv": {"is_adapter_inactive": true}' in lines[-3]) is is_inactive


async def test_a_stored_session_knows_the_invocation(pool: FakePool) -> None:
    service = make_service(pool)
    session = await service.get_session(None, (await forked(service)).session_id)
    again = from_fields(to_fields(session))
    assert again.adapters == session.adapters
    assert again.branch("b").adapter == session.branch("b").adapter == alora().ref


def test_a_stored_adapter_knows_the_invocation_and_an_older_one_has_none() -> None:
    text = adapter_to_json(alora())
    assert adapter_from_json(text) == alora()
    older = {name: value for name, value in json.loads(text).items() if name != "invocation_tokens"}
    assert adapter_from_json(json.dumps(older)).invocation_tokens == ()
