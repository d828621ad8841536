"""The one directory mirror of this process for each directory, and the task that keeps it up to date.

Kept apart from the router: Serve pickles a router's module by value, so globals there are silently duplicated.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

from forkkv_cluster.core.errors import FailedPrecondition
from forkkv_cluster.directory.client import DirectoryClient, follow
from forkkv_cluster.directory.mirror import DirectoryMirror


@dataclass(slots=True)
class _Followed:
    mirror: DirectoryMirror
    follower: asyncio.Task[None] | None = None


_lock = threading.Lock()
_followed: dict[str, _Followed] = {}


def mirror_of(directory: str, speculative_ttl_s: float) -> DirectoryMirror:
    """The process's mirror of the directory actor named ``directory``; the first caller sets the ttl, seconds."""
    with _lock:
        entry = _followed.get(directory)
        if entry is None:
            entry = _followed[directory] = _Followed(DirectoryMirror(speculative_ttl_s))
        return entry.mirror


def ensure_following(directory: str) -> None:
    """Start following on the running loop, unless a live task does so already. Cheap enough to call for each request.

    Raises RuntimeError without a running loop, and KeyError before ``mirror_of``.
    """
    entry = _followed[directory]
    task = entry.follower
    if task is not None and not task.done() and not task.get_loop().is_closed():
        return
    with _lock:
        if entry.follower is task:
            entry.follower = asyncio.get_running_loop().create_task(_follow_while_connected(entry.mirror, directory))


async def _follow_while_connected(mirror: DirectoryMirror, directory: str) -> None:
    try:
        await follow(mirror, DirectoryClient(directory, creates=False))
    except FailedPrecondition:
        return  # This process has left its Ray cluster; the next request, if there is one, starts over.


async def stop_following(directory: str) -> None:
    """Cancel the follower and forget the mirror; for tests and shutdown."""
    with _lock:
        entry = _followed.pop(directory, None)
    if entry is not None and entry.follower is not None:
        entry.follower.cancel()
