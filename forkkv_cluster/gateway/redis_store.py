"""Sessions in Redis, for several gateways. Updates are optimistic: watch, read, change, write if nobody else wrote.

forkkv:session:ID     hash of the fields of ``session_fields``
forkkv:sessions       sorted set of ids by creation time
forkkv:adapters       hash name -> JSON
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, WatchError

from forkkv_cluster.core.errors import Aborted, AlreadyExists, Unavailable
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.core.session import Session
from forkkv_cluster.gateway.session_fields import adapter_from_json, adapter_to_json, changed_fields, from_fields, to_fields
from forkkv_cluster.gateway.session_store import Change, unknown_session

_INDEX = "forkkv:sessions"
_ADAPTERS = "forkkv:adapters"
MAX_ATTEMPTS = 16
"""Lost races after which an update gives up: so many in a row mean one very hot session."""


def _key(session_id: str) -> str:
    return f"forkkv:session:{session_id}"


@asynccontextmanager
async def _reachable() -> AsyncIterator[None]:
    try:
        yield
    except WatchError:
        raise
    except RedisError as error:
        raise Unavailable(f"the session store does not answer ({error}). Try again.") from error


class RedisSessionStore:
    """``client`` is a ``redis.asyncio.Redis`` with ``decode_responses`` off."""

    def __init__(self, client: Any) -> None:
        self._redis = client

    @classmethod
    def from_url(cls, url: str) -> RedisSessionStore:
        return cls(Redis.from_url(url))

    async def add(self, session: Session) -> None:
        key = _key(session.session_id)
        async with _reachable():
            # The first field claims the id, so that two adds of one id cannot both win.
            fields = to_fields(session)
            if not await self._redis.hsetnx(key, "meta", fields["meta"]):
                raise AlreadyExists("session", session.session_id, "Let the server choose the id.")
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(key, mapping=fields)
                pipe.zadd(_INDEX, {session.session_id: session.created_s})
                await pipe.execute()

    async def get(self, session_id: str) -> Session:
        async with _reachable():
            return _decode(session_id, await self._redis.hgetall(_key(session_id)))

    async def update(self, session_id: str, change: Change) -> Session:
        for _ in range(MAX_ATTEMPTS):
            try:
                async with _reachable():
                    return await self._try_update(session_id, change)
            except WatchError:
                continue
        raise Aborted(f"session {session_id} changed {MAX_ATTEMPTS} times while it was updated. Try again.")

    async def _try_update(self, session_id: str, change: Change) -> Session:
        key = _key(session_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(key)
            old = _decode(session_id, await pipe.hgetall(key))
            new = change(old)
            pipe.multi()
            pipe.hset(key, mapping=changed_fields(old, new))
            await pipe.execute()
        return new

    async def remove(self, session_id: str) -> None:
        async with _reachable(), self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(_key(session_id))
            pipe.zrem(_INDEX, session_id)
            removed, _ = await pipe.execute()
        if not removed:
            raise unknown_session(session_id)

    async def list(self) -> list[Session]:
        async with _reachable():
            ids = [member.decode() for member in await self._redis.zrange(_INDEX, 0, -1)]
            found = [(session_id, await self._redis.hgetall(_key(session_id))) for session_id in ids]
        return [_decode(session_id, fields) for session_id, fields in found if fields]

    async def put_adapter(self, adapter: AdapterInfo) -> None:
        async with _reachable():
            await self._redis.hset(_ADAPTERS, adapter.name, adapter_to_json(adapter))

    async def remove_adapter(self, name: str) -> None:
        async with _reachable():
            await self._redis.hdel(_ADAPTERS, name)

    async def adapters(self) -> dict[str, AdapterInfo]:
        async with _reachable():
            found = await self._redis.hgetall(_ADAPTERS)
        return {name.decode(): adapter_from_json(info) for name, info in found.items()}

    async def close(self) -> None:
        await self._redis.aclose()


def _decode(session_id: str, fields: dict[bytes, bytes]) -> Session:
    if not fields:
        raise unknown_session(session_id)
    return from_fields({name.decode(): value for name, value in fields.items()})
