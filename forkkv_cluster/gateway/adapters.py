"""Which adapters exist, by name. Weights live on the workers; here are names, digests and where the files are.

Adapters of the configuration are loaded by every worker at its start. Those loaded later are written to the store and
loaded on every worker that is up; a worker that starts afterwards answers NotFound, and gets them at that moment.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from forkkv_cluster.core.errors import FailedPrecondition, ForkKVError, Internal, InvalidArgument, NotFound, Unavailable
from forkkv_cluster.core.request import AdapterInfo, AdapterRef, Sharing
from forkkv_cluster.gateway.session_store import SessionStore
from forkkv_cluster.gateway.worker_pool import WorkerPool


class AdapterRegistry:
    """``refresh`` once before use: the configuration's adapters are learned from the workers."""

    def __init__(self, pool: WorkerPool, store: SessionStore) -> None:
        self._pool = pool
        self._store = store
        self._configured: dict[str, AdapterInfo] = {}

    async def refresh(self) -> None:
        """Learn what the workers have. Adapters that only the store knows are loaded again on first use."""
        stored = await self._store.adapters()
        for result in await self._pool.broadcast("list_adapters"):
            if not isinstance(result, BaseException):
                self._configured.update({info.name: info for info in result if info.name not in stored})

    async def list(self) -> tuple[AdapterInfo, ...]:
        """By name."""
        known = {**self._configured, **await self._store.adapters()}
        return tuple(known[name] for name in sorted(known))

    async def resolve(self, name: str | None) -> AdapterRef | None:
        """The adapter of that name; None stays None, the base model. Raises NotFound."""
        if not name:
            return None
        known = {info.name: info for info in await self.list()}
        if name not in known:
            names = ", ".join(known) or "none"
            raise NotFound(
                "adapter", name, f"Loaded adapters: {names}. Load it with LoadAdapter or name it in the configuration."
            )
        return known[name].ref

    async def load(self, name: str, path: str, sharing: Sharing | None = None) -> AdapterInfo:
        """Load on every worker, or on none; the same weights under the same name again are no error. ``sharing``: how ``auto``
        is served on it; ``auto`` makes each worker measure it, None leaves what the name has, else is the default.

        A relative path counts from where the server runs: a worker may start elsewhere, so the absolute one is kept.
        Raises what the workers raise: InvalidArgument, Unsupported, AlreadyExists.
        """
        _check_name(name)
        if not path:
            raise InvalidArgument("path", path, "is empty", "Name a PEFT directory that every worker can read.")
        before = {info.name: info for info in await self.list()}.get(name)
        info = await self._load_everywhere(name, _absolute(path), before, sharing)
        await self._store.put_adapter(replace(info, verdict=None))
        return info

    async def unload(self, name: str) -> None:
        """Forget it here and on every worker. Raises NotFound."""
        _check_name(name)
        await self.resolve(name)
        _raise_first([r for r in await self._pool.broadcast("unload_adapter", name) if not isinstance(r, NotFound)])
        self._configured.pop(name, None)
        await self._store.remove_adapter(name)

    async def restore(self, adapter: AdapterRef) -> bool:
        """Load it again where it is missing; False when its files are not known.

        Raises FailedPrecondition when the files are not what they were: no worker keeps other content under the name.
        """
        info = {info.name: info for info in await self.list()}.get(adapter.name)
        if info is None or info.digest != adapter.digest:
            return False
        await self._check_files(info)
        return (await self._load_everywhere(info.name, info.path, info, info.sharing)).digest == adapter.digest

    async def _check_files(self, info: AdapterInfo) -> None:
        # Under a name of its own: unloading the real one again would take it from the workers that still have the content.
        probe = f"{info.name} (restored)"
        found = await self._load_everywhere(probe, info.path, None, Sharing.ISOLATED)  # nothing to measure
        await self._pool.broadcast("unload_adapter", probe)
        if found.digest != info.digest:
            raise FailedPrecondition(
                f"adapter {info.name!r} cannot be restored: the files in {info.path} changed since it was loaded (digest then "
                f"{info.digest}, now {found.digest}). Put the old files back, or unload the adapter and load it again."
            )

    async def _load_everywhere(self, name: str, path: str, before: AdapterInfo | None, sharing: Sharing | None) -> AdapterInfo:
        """``before`` is what the name stood for: then it stays on the workers that still have it."""
        results = await self._pool.broadcast("load_adapter", name, path, sharing)
        loaded = [result for result in results if isinstance(result, AdapterInfo)]
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures and loaded and before is None:
            await self._pool.broadcast("unload_adapter", name)
        _raise_first(failures)
        if not loaded:
            raise Unavailable("no worker is up. Try again.")
        return loaded[0]


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _check_name(name: str) -> None:
    if not name:
        raise InvalidArgument("name", name, "is empty", "Name the adapter.")


def _raise_first(results: list[Any]) -> None:
    for result in results:
        if isinstance(result, ForkKVError):
            raise result
        if isinstance(result, BaseException):
            raise Internal(f"a worker failed: {result}") from result
