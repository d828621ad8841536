"""Names of adapters and the device slots that hold their weights. Pages are keyed by content digest, never by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from forkkv_cluster.core.errors import AlreadyExists, NotFound
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo, AdapterRef


class AdapterRunner(Protocol):
    """The part of the model runner that holds weights."""

    def load_adapter(self, name: str, path: str) -> tuple[int, AdapterInfo]:
        """Read a PEFT directory into a free slot. Raises InvalidArgument or Unsupported; then nothing has changed."""
        ...

    def unload_adapter(self, slot: int) -> None: ...

    def residual_rank(self, slot: int) -> int: ...


@dataclass(slots=True)
class LoadedAdapter:
    """Weights on the device. ``num_users``: sequences that run with them; ``names`` empty: gone once the last has ended."""

    slot: int
    info: AdapterInfo
    residual_rank: int
    names: set[str]
    num_users: int = 0


class AdapterRegistry:
    """Loads, finds and unloads. Two names of equal content share one slot."""

    def __init__(self, runner: AdapterRunner) -> None:
        self._runner = runner
        self._by_digest: dict[AdapterDigest, LoadedAdapter] = {}
        self._by_name: dict[str, AdapterInfo] = {}

    def load(self, name: str, path: str) -> tuple[AdapterInfo, bool]:
        """The adapter's facts, and whether its weights are new here.

        Loading the same content under the same name again changes nothing. Raises AlreadyExists when the name stands
        for other content.
        """
        slot, info = self._runner.load_adapter(name, path)
        known, named = self._by_digest.get(info.digest), self._by_name.get(name)
        if known is not None or (named is not None and named.digest != info.digest):
            self._runner.unload_adapter(slot)
        if named is not None and named.digest != info.digest:
            raise AlreadyExists("adapter", name, "It has other content: unload it first, or choose another name.")
        if known is None:
            self._by_digest[info.digest] = LoadedAdapter(slot, info, self._runner.residual_rank(slot), {name})
        else:
            known.names.add(name)
        self._by_name[name] = info
        return info, known is None

    def unload(self, name: str) -> AdapterDigest | None:
        """Forget the name; requests under way finish. Returns the digest if its weights are gone with it."""
        info = self._by_name.pop(name, None)
        if info is None:
            raise NotFound("adapter", name, self._known())
        adapter = self._by_digest[info.digest]
        adapter.names.discard(name)
        return self._drop_if_unused(adapter)

    def acquire(self, ref: AdapterRef) -> LoadedAdapter:
        """The adapter for one more user. Raises NotFound unless it is loaded under some name."""
        adapter = self._by_digest.get(ref.digest)
        if adapter is None or not adapter.names:
            raise NotFound("adapter", ref.name, self._known())
        adapter.num_users += 1
        return adapter

    def release(self, adapter: LoadedAdapter) -> AdapterDigest | None:
        """One user less. Returns the digest if the weights are gone with it."""
        adapter.num_users -= 1
        return self._drop_if_unused(adapter)

    def infos(self) -> tuple[AdapterInfo, ...]:
        """Every loaded adapter, by name."""
        return tuple(self._by_name[name] for name in sorted(self._by_name))

    def digests(self) -> tuple[AdapterDigest, ...]:
        """Content whose weights are on the device."""
        return tuple(self._by_digest)

    def _drop_if_unused(self, adapter: LoadedAdapter) -> AdapterDigest | None:
        if adapter.names or adapter.num_users:
            return None
        del self._by_digest[adapter.info.digest]
        self._runner.unload_adapter(adapter.slot)
        return adapter.info.digest

    def _known(self) -> str:
        return f"Loaded here: {', '.join(sorted(self._by_name)) or 'none'}. Load it first."
