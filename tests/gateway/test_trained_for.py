"""An answer says when its adapter was trained for another sharing than it was served under."""

from __future__ import annotations

import json
from dataclasses import replace

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


def trained() -> AdapterInfo:
    return replace(adapter_info("trained"), trained_for=Sharing.EAGER)


@pytest.fixture
def pool() -> FakePool:
    return FakePool(adapters={"trained": trained(), "planner": adapter_info("planner")})


async def forked(service: GatewayService) -> Session:
    """Branches that are served as trained, otherwise, and by an adapter that says nothing."""
    command = CreateSessionCommand(TextOrTokens("a shared context"), ("trained", "planner"), Sharing.EAGER)
    session = await service.create_session(None, command)
    specs = (BranchSpec("as", "trained"), BranchSpec("other", "trained", Sharing.RESIDUAL), BranchSpec("plain", "planner"))
    await service.fork(None, session.session_id, specs, None)
    return session


async def finished(service: GatewayService, target: BranchTarget | StatelessTarget, turn_id: str = "") -> TurnFinished:
    command = GenerateCommand(target, TextOrTokens("hm"), SamplingChoice(max_tokens=4), turn_id=turn_id)
    events = [event async for event in service.generate(None, command)]
    assert isinstance(events[-1], TurnFinished)
    return events[-1]


async def test_a_turn_says_what_its_adapter_was_trained_for_only_where_it_is_served_otherwise(pool: FakePool) -> None:
    service = make_service(pool)
    session = await forked(service)
    targets = {name: BranchTarget(session.session_id, name) for name in ("as", "other", "plain")}
    said = {name: (await finished(service, target)).mismatched_training for name, target in targets.items()}
    assert said == {"as": None, "other": Sharing.EAGER, "plain": None}
    assert (await finished(service, StatelessTarget("trained"))).mismatched_training is Sharing.EAGER  # runs isolated


async def test_a_turn_from_the_store_still_says_it(pool: FakePool) -> None:
    store = MemorySessionStore()
    session = await forked(make_service(pool, store=store))
    for name, wanted in (("as", None), ("other", Sharing.EAGER)):
        target = BranchTarget(session.session_id, name)
        await finished(make_service(pool, store=store), target, "one")
        replayed = await finished(make_service(pool, store=store), target, "one")
        assert replayed.finish_reason is None
        assert replayed.mismatched_training is wanted


async def test_http_says_it_in_usage_and_in_the_last_chunk_of_a_stream(pool: FakePool) -> None:
    service = make_service(pool)
    with TestClient(build_http_app(lambda: service)) as client:
        for model, wanted in (("trained", "eager"), ("planner", None)):
            body = {"model": model, "prompt": "hi", "max_tokens": 4}
            usage = client.post("/v1/completions", json=body).json()["usage"]["forkkv"]
            assert usage["mismatched_training"] == wanted
            lines = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
            assert ('"forkkv": {"mismatched_training": "eager"}' in lines[-3]) is (wanted is not None)


async def test_stored_sessions_and_adapters_know_it_and_older_ones_say_nothing(pool: FakePool) -> None:
    service = make_service(pool)
    session = await service.get_session(None, (await forked(service)).session_id)
    again = from_fields(to_fields(session))
    assert [ref.trained_for for ref in again.adapters] == [Sharing.EAGER, None]
    adapter = again.branch("as").adapter
    assert adapter is not None
    assert adapter.trained_for is Sharing.EAGER
    text = adapter_to_json(trained())
    assert adapter_from_json(text) == trained()
    assert adapter_from_json(text).trained_for is Sharing.EAGER
    older = {name: value for name, value in json.loads(text).items() if name != "trained_for"}
    assert adapter_from_json(json.dumps(older)).trained_for is None


async def test_the_list_of_models_names_it(pool: FakePool) -> None:
    service = make_service(pool)
    with TestClient(build_http_app(lambda: service)) as client:
        listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert listed["trained"]["trained_for"] == "eager"
    assert "trained_for" not in listed["planner"]
