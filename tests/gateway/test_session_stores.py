"""What every store promises, over all of them; and what is special about the file."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forkkv_cluster.core.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterRef, Sharing, WriterMode
from forkkv_cluster.core.session import BranchSpec, JoinWhat, Session, Turn
from forkkv_cluster.core.verdict import unmeasured
from forkkv_cluster.gateway.redis_store import MAX_ATTEMPTS, RedisSessionStore
from forkkv_cluster.gateway.session_fields import adapter_from_json, adapter_to_json, changed_fields, from_fields, to_fields
from forkkv_cluster.gateway.session_store import MemorySessionStore, SessionStore, open_session_store
from forkkv_cluster.gateway.sqlite_store import SqliteSessionStore
from tests.gateway.fake_redis import FakeRedis
from tests.gateway.fakes import adapter_info

PLANNER = AdapterRef("planner", AdapterDigest("a" * 32))


def tokens(*values: int) -> TokenArray:
    return np.asarray(values, dtype=np.int32)


def new_session(session_id: str = "session-1", created_s: float = 1.5) -> Session:
    return Session(session_id, "tenant", tokens(1, 2, 3), (PLANNER,), Sharing.EAGER, WriterMode.CANONICAL, created_s, "group")


def worked_session() -> Session:
    """Forked twice, with a turn, a join, and a branch whose context no longer begins the session's."""
    session = new_session().fork((BranchSpec("a", "planner"), BranchSpec("b", None, Sharing.ISOLATED)))
    session = session.finish_turn("a", tokens(7), tokens(8, 9), "turn-1", "fingerprint-1")
    session = session.fork((BranchSpec("child", None),), parent="a")
    return session.join("a", JoinWhat.OUTPUT)[0]


def same(left: Session, right: Session) -> bool:
    return to_fields(left) == to_fields(right)


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SessionStore]:
    stores = {
        "memory": MemorySessionStore,
        "sqlite": lambda: SqliteSessionStore(tmp_path / "sessions.sqlite"),
        "redis": lambda: RedisSessionStore(FakeRedis()),
    }
    store: SessionStore = stores[request.param]()  # type: ignore[operator]
    yield store
    await store.close()


def test_a_session_survives_its_fields() -> None:
    session = worked_session()
    again = from_fields(to_fields(session))
    assert same(session, again)
    assert again.branch("child").context.tolist() == [1, 2, 3, 7, 8, 9]
    assert again.branch("a").turns == (Turn(0, 1, 3, "turn-1", "fingerprint-1"),)
    assert again.branch("a").joined_len == 3
    assert list(again.branches) == ["a", "b", "child"]


def test_a_turn_that_was_stored_without_a_fingerprint_is_read() -> None:
    fields = to_fields(worked_session())
    old = {**fields, "branch:a": fields["branch:a"].replace(b', "fingerprint-1"]', b"]")}
    assert old != fields
    assert from_fields(old).branch("a").turns == (Turn(0, 1, 3, "turn-1"),)


def test_how_long_to_keep_survives_and_is_none_in_sessions_stored_without_it() -> None:
    fields = to_fields(replace(worked_session(), keep_s=30.0))
    assert from_fields(fields).keep_s == 30.0
    old = {**fields, "meta": fields["meta"].replace(b', "keep_s": 30.0', b"")}
    assert old != fields
    assert from_fields(old).keep_s == 0.0


def test_only_what_changed_is_written() -> None:
    session = worked_session()
    assert set(changed_fields(session, session.finish_turn("b", tokens(1), tokens(2)))) == {"meta", "branch:b"}
    assert set(changed_fields(session, session.join("a", JoinWhat.ALL)[0])) == {"meta", "context", "branch:a"}


def test_the_context_is_stored_once_for_all_branches_that_begin_it() -> None:
    fields = to_fields(worked_session())
    assert len(fields["branch:b"].partition(b"\n")[2]) == 0
    assert len(fields["branch:child"].partition(b"\n")[2]) == 6 * 4


async def test_a_stored_session_is_found(store: SessionStore) -> None:
    await store.add(worked_session())
    assert same(await store.get("session-1"), worked_session())


async def test_an_update_is_seen_afterwards(store: SessionStore) -> None:
    await store.add(worked_session())
    await store.update("session-1", lambda session: session.finish_turn("b", tokens(5), tokens(6)))
    assert (await store.get("session-1")).branch("b").own.tolist() == [5, 6]


async def test_a_change_that_raises_changes_nothing(store: SessionStore) -> None:
    await store.add(new_session())
    with pytest.raises(NotFound):
        await store.update("session-1", lambda session: session.fork((BranchSpec("x", "nobody"),)))
    assert (await store.get("session-1")).branches == {}


async def test_an_id_is_given_once(store: SessionStore) -> None:
    await store.add(new_session())
    with pytest.raises(AlreadyExists):
        await store.add(new_session())


async def test_a_removed_session_is_unknown(store: SessionStore) -> None:
    await store.add(new_session())
    await store.remove("session-1")
    with pytest.raises(NotFound, match="session-1"):
        await store.get("session-1")
    with pytest.raises(NotFound):
        await store.remove("session-1")


async def test_sessions_are_listed_oldest_first(store: SessionStore) -> None:
    await store.add(new_session("session-b", 2.0))
    await store.add(new_session("session-a", 3.0))
    await store.add(new_session("session-c", 1.0))
    assert [session.session_id for session in await store.list()] == ["session-c", "session-b", "session-a"]


async def test_adapters_are_kept_by_name(store: SessionStore) -> None:
    await store.put_adapter(adapter_info("planner"))
    assert await store.adapters() == {"planner": adapter_info("planner")}
    await store.remove_adapter("planner")
    await store.remove_adapter("planner")
    assert await store.adapters() == {}


async def test_what_an_adapter_was_loaded_with_and_trained_for_is_kept(store: SessionStore) -> None:
    info = replace(adapter_info("planner"), sharing=Sharing.AUTO, trained_for=Sharing.EAGER)
    await store.put_adapter(info)
    assert (await store.adapters())["planner"] == info


def test_what_workers_found_is_not_stored_and_other_adapters_are_stored_as_ever() -> None:
    info = replace(adapter_info("planner"), sharing=Sharing.AUTO)
    assert adapter_from_json(adapter_to_json(replace(info, verdict=unmeasured(Sharing.ISOLATED)))) == info
    assert set(json.loads(adapter_to_json(adapter_info("planner")))).isdisjoint({"sharing", "trained_for", "verdict"})


async def test_a_file_outlives_its_process(tmp_path: Path) -> None:
    store = SqliteSessionStore(tmp_path / "deep" / "sessions.sqlite")
    await store.add(worked_session())
    await store.update("session-1", lambda session: session.finish_turn("b", tokens(5), tokens(6)))
    await store.close()
    again = SqliteSessionStore(tmp_path / "deep" / "sessions.sqlite")
    assert (await again.get("session-1")).branch("b").own.tolist() == [5, 6]
    await again.close()


def _hold(path: str, ready: object, release: object) -> None:
    store = SqliteSessionStore(path)  # Held on to: a store that nobody has any more lets go of its file.
    ready.set()  # type: ignore[attr-defined]
    release.wait()  # type: ignore[attr-defined]
    assert store.path.exists()


def test_a_second_process_is_refused_and_told_who_owns_the_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    path = tmp_path / "sessions.sqlite"
    owner = context.Process(target=_hold, args=(str(path), ready, release))
    owner.start()
    try:
        assert ready.wait(30)
        with pytest.raises(FailedPrecondition, match=rf"sessions\.sqlite.*{owner.pid}"):
            SqliteSessionStore(path, lock_wait_s=0.0)
    finally:
        release.set()
        owner.join(10)
    assert owner.exitcode == 0
    asyncio.run(SqliteSessionStore(path, lock_wait_s=5.0).close())


def test_a_file_in_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match="cannot be opened"):
        SqliteSessionStore(tmp_path / "file" / "sessions.sqlite")


async def test_redis_updates_that_cross_are_both_kept() -> None:
    redis = FakeRedis()
    store, other = RedisSessionStore(redis), RedisSessionStore(redis)
    await store.add(worked_session())
    crossed = 0

    def change(session: Session) -> Session:
        nonlocal crossed
        if crossed == 0:
            crossed += 1
            redis.between = other.update("session-1", lambda s: s.finish_turn("a", tokens(5), tokens(6)))
        return session.finish_turn("b", tokens(3), tokens(4))

    after = await store.update("session-1", change)
    assert after.branch("a").own.tolist()[-2:] == [5, 6]
    assert after.branch("b").own.tolist() == [3, 4]


async def test_redis_gives_up_a_session_that_never_stands_still() -> None:
    redis = FakeRedis()
    store = RedisSessionStore(redis)
    await store.add(worked_session())
    redis.always_changed = True
    with pytest.raises(Aborted, match=f"{MAX_ATTEMPTS} times"):
        await store.update("session-1", lambda session: session.finish_turn("b", tokens(3), tokens(4)))


def test_the_configuration_names_the_store(tmp_path: Path) -> None:
    assert isinstance(open_session_store("memory:"), MemorySessionStore)
    sqlite = open_session_store(f"sqlite:{tmp_path}/s.sqlite")
    assert isinstance(sqlite, SqliteSessionStore)
    asyncio.run(sqlite.close())
    assert isinstance(open_session_store("redis://127.0.0.1:1/0"), RedisSessionStore)
