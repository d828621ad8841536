"""Where sessions live: one border, three stores. The durable truth; KV is only cache.

    memory:                   this process, gone with it (tests, demos)
    sqlite:PATH               one file, one gateway process (the default)
    redis://HOST:PORT/DB      several gateways; updates are optimistic

A store also keeps the adapters that were loaded while the cluster ran, so that a restarted worker can load them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from forkkv_cluster.core.errors import AlreadyExists, NotFound
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.core.session import Session

Change = Callable[[Session], Session]
"""A pure step from one state of a session to the next; it may raise, and may be tried again on a newer state."""


class SessionStore(Protocol):
    """Every method may raise Unavailable while the store is away."""

    async def add(self, session: Session) -> None:
        """Store a new session. Raises AlreadyExists."""
        ...

    async def get(self, session_id: str) -> Session:
        """Raises NotFound."""
        ...

    async def update(self, session_id: str, change: Change) -> Session:
        """Apply ``change`` atomically and durably; returns the new state. Raises NotFound, or what ``change`` raises."""
        ...

    async def remove(self, session_id: str) -> None:
        """Raises NotFound."""
        ...

    async def list(self) -> list[Session]:
        """All sessions, oldest first."""
        ...

    async def put_adapter(self, adapter: AdapterInfo) -> None: ...

    async def remove_adapter(self, name: str) -> None:
        """Harmless when it is not there."""
        ...

    async def adapters(self) -> dict[str, AdapterInfo]: ...

    async def close(self) -> None: ...


def unknown_session(session_id: str) -> NotFound:
    return NotFound("session", session_id, "It was closed, or never created here. Create one.")


class MemorySessionStore:
    """Sessions of this process."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._adapters: dict[str, AdapterInfo] = {}

    async def add(self, session: Session) -> None:
        if session.session_id in self._sessions:
            raise AlreadyExists("session", session.session_id, "Let the server choose the id.")
        self._sessions[session.session_id] = session

    async def get(self, session_id: str) -> Session:
        try:
            return self._sessions[session_id]
        except KeyError:
            raise unknown_session(session_id) from None

    async def update(self, session_id: str, change: Change) -> Session:
        session = change(await self.get(session_id))
        self._sessions[session_id] = session
        return session

    async def remove(self, session_id: str) -> None:
        await self.get(session_id)
        del self._sessions[session_id]

    async def list(self) -> list[Session]:
        return sorted(self._sessions.values(), key=lambda session: session.created_s)

    async def put_adapter(self, adapter: AdapterInfo) -> None:
        self._adapters[adapter.name] = adapter

    async def remove_adapter(self, name: str) -> None:
        self._adapters.pop(name, None)

    async def adapters(self) -> dict[str, AdapterInfo]:
        return dict(self._adapters)

    async def close(self) -> None:
        return None


def open_session_store(url: str) -> SessionStore:
    """The store that ``gateway.session_store`` names; the configuration has checked its form."""
    kind, _, rest = url.partition(":")
    if kind == "sqlite":
        from forkkv_cluster.gateway.sqlite_store import SqliteSessionStore

        return SqliteSessionStore(rest)
    if kind == "redis":
        from forkkv_cluster.gateway.redis_store import RedisSessionStore

        return RedisSessionStore.from_url(url)
    return MemorySessionStore()
