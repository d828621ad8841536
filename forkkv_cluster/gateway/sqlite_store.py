"""Sessions in one SQLite file, owned by exactly one gateway process.

A lock file holds a second process off: two caches over one file would disagree. Every update is one transaction in WAL
mode with ``synchronous=NORMAL``: it survives the death of the process; a power cut may lose the last moments, never the
file. Decoded sessions are kept in memory, so that only writes touch the file (some 0.2 ms each, on the event loop).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from forkkv_cluster.core.errors import AlreadyExists, FailedPrecondition, Unavailable
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.core.session import Session
from forkkv_cluster.gateway.session_fields import adapter_from_json, adapter_to_json, changed_fields, from_fields, to_fields
from forkkv_cluster.gateway.session_store import Change, unknown_session

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (session_id TEXT PRIMARY KEY, created_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fields (
    session_id TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE,
    name TEXT NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (session_id, name)
);
CREATE TABLE IF NOT EXISTS adapters (name TEXT PRIMARY KEY, info TEXT NOT NULL);
"""


class SqliteSessionStore:
    """``path`` is created with its folder. Raises FailedPrecondition while another process owns it."""

    def __init__(self, path: str | Path, *, lock_wait_s: float = 5.0) -> None:
        self.path = Path(path).absolute()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path.with_name(self.path.name + ".lock"), lock_wait_s)
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON;" + _SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise FailedPrecondition(
                f"gateway.session_store=sqlite:{self.path} cannot be opened ({error}). Name a file in a writable folder."
            ) from None
        self._cache: dict[str, Session] = {}

    async def add(self, session: Session) -> None:
        with self._transaction():
            try:
                self._db.execute("INSERT INTO sessions VALUES (?, ?)", (session.session_id, session.created_s))
            except sqlite3.IntegrityError:
                raise AlreadyExists("session", session.session_id, "Let the server choose the id.") from None
            self._write(session.session_id, to_fields(session))
        self._cache[session.session_id] = session

    async def get(self, session_id: str) -> Session:
        if session_id not in self._cache:
            rows = self._db.execute("SELECT name, value FROM fields WHERE session_id = ?", (session_id,)).fetchall()
            if not rows:
                raise unknown_session(session_id)
            self._cache[session_id] = from_fields(dict(rows))
        return self._cache[session_id]

    async def update(self, session_id: str, change: Change) -> Session:
        old = await self.get(session_id)
        new = change(old)
        with self._transaction():
            self._write(session_id, changed_fields(old, new))
        self._cache[session_id] = new
        return new

    async def remove(self, session_id: str) -> None:
        with self._transaction():
            removed = self._db.execute("DELETE FROM sessions WHERE session_id = ?", (session_id,)).rowcount
        self._cache.pop(session_id, None)
        if removed == 0:
            raise unknown_session(session_id)

    async def list(self) -> list[Session]:
        rows = self._db.execute("SELECT session_id FROM sessions ORDER BY created_s, session_id").fetchall()
        return [await self.get(session_id) for (session_id,) in rows]

    async def put_adapter(self, adapter: AdapterInfo) -> None:
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO adapters VALUES (?, ?)", (adapter.name, adapter_to_json(adapter)))

    async def remove_adapter(self, name: str) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM adapters WHERE name = ?", (name,))

    async def adapters(self) -> dict[str, AdapterInfo]:
        rows = self._db.execute("SELECT name, info FROM adapters").fetchall()
        return {name: adapter_from_json(info) for name, info in rows}

    async def close(self) -> None:
        self.release()

    def release(self) -> None:
        """Close the file and give its lock to whoever waits. Harmless when repeated."""
        self._db.close()
        self._lock.close()

    def _write(self, session_id: str, fields: Mapping[str, bytes]) -> None:
        rows = [(session_id, name, value) for name, value in fields.items()]
        self._db.executemany("INSERT OR REPLACE INTO fields VALUES (?, ?, ?)", rows)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """All or nothing; a failing disk becomes Unavailable, and nothing was changed."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise Unavailable(f"the session store cannot write ({error}). Free some disk space, then try again.") from error


def check_can_open(path: str | Path, *, lock_wait_s: float = 1.0) -> None:
    """Open the file and let it go. Raises FailedPrecondition as ``SqliteSessionStore`` does."""
    store = SqliteSessionStore(path, lock_wait_s=lock_wait_s)
    store.release()


def _lock(path: Path, wait_s: float) -> IO[str]:
    """Hold ``path`` for the life of the process. Waits a little: a replaced gateway may still be on its way out."""
    file = path.open("a+")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                file.close()
                raise FailedPrecondition(
                    f"gateway.session_store={path.with_suffix('')} belongs to the running process {owner}. "
                    "Stop it, name another file, or use redis:// for several gateways."
                ) from None
            time.sleep(0.05)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
