"""The few commands of ``redis.asyncio.Redis`` that the store uses, with WATCH as Redis has it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Self

from redis.exceptions import WatchError


class FakeRedis:
    """``between`` is awaited once before the next transaction; ``always_changed`` fails every watched one."""

    def __init__(self) -> None:
        self.hashes: dict[str, dict[bytes, bytes]] = {}
        self.sorted_sets: dict[str, dict[bytes, float]] = {}
        self.versions: dict[str, int] = {}
        self.between: Awaitable[Any] | None = None
        self.always_changed = False

    def pipeline(self, transaction: bool = True) -> Pipeline:
        return Pipeline(self)

    async def hsetnx(self, key: str, field: str, value: bytes) -> bool:
        if _bytes(field) in self.hashes.get(key, {}):
            return False
        await self.hset(key, field, value)
        return True

    async def hset(self, key: str, field: str | None = None, value: Any = None, mapping: dict[str, Any] | None = None) -> int:
        values = mapping if mapping is not None else {str(field): value}
        self.hashes.setdefault(key, {}).update({_bytes(name): _bytes(item) for name, item in values.items()})
        self.versions[key] = self.versions.get(key, 0) + 1
        return len(values)

    async def hgetall(self, key: str) -> dict[bytes, bytes]:
        return dict(self.hashes.get(key, {}))

    async def hdel(self, key: str, field: str) -> int:
        return int(self.hashes.get(key, {}).pop(_bytes(field), None) is not None)

    async def delete(self, key: str) -> int:
        self.versions[key] = self.versions.get(key, 0) + 1
        return int(self.hashes.pop(key, None) is not None)

    async def zadd(self, key: str, mapping: dict[str, float]) -> int:
        self.sorted_sets.setdefault(key, {}).update({_bytes(name): score for name, score in mapping.items()})
        return len(mapping)

    async def zrem(self, key: str, member: str) -> int:
        return int(self.sorted_sets.get(key, {}).pop(_bytes(member), None) is not None)

    async def zrange(self, key: str, start: int, end: int) -> list[bytes]:
        members = self.sorted_sets.get(key, {})
        return sorted(members, key=lambda member: members[member])

    async def aclose(self) -> None:
        return None


class Pipeline:
    """Immediate until ``multi``, when a key is watched; else everything waits for ``execute``."""

    def __init__(self, redis: FakeRedis) -> None:
        self._redis = redis
        self._watched: dict[str, int] = {}
        self._is_queueing = True
        self._queue: list[Awaitable[Any]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for call in self._queue:
            call.close()  # type: ignore[attr-defined]

    async def watch(self, key: str) -> None:
        self._watched[key] = self._redis.versions.get(key, 0)
        self._is_queueing = False

    def multi(self) -> None:
        self._is_queueing = True

    async def hgetall(self, key: str) -> dict[bytes, bytes]:
        assert not self._is_queueing
        return await self._redis.hgetall(key)

    def hset(self, key: str, mapping: dict[str, Any]) -> None:
        self._queue.append(self._redis.hset(key, mapping=mapping))

    def delete(self, key: str) -> None:
        self._queue.append(self._redis.delete(key))

    def zadd(self, key: str, mapping: dict[str, float]) -> None:
        self._queue.append(self._redis.zadd(key, mapping))

    def zrem(self, key: str, member: str) -> None:
        self._queue.append(self._redis.zrem(key, member))

    async def execute(self) -> list[Any]:
        between, self._redis.between = self._redis.between, None
        if between is not None:
            await between
        changed = any(self._redis.versions.get(key, 0) != version for key, version in self._watched.items())
        if self._watched and (changed or self._redis.always_changed):
            raise WatchError("a watched key changed")
        queue, self._queue = self._queue, []
        return [await call for call in queue]


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
