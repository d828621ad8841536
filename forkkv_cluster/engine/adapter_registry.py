"""Names of adapters, and who uses them. Pages are keyed by content digest, never by name."""

from __future__ import annotations

from dataclasses import replace

from forkkv_cluster.core.errors import AlreadyExists, NotFound
from forkkv_cluster.core.request import AdapterInfo, AdapterRef
from forkkv_cluster.engine.adapter_tiers import AdapterTiers, LoadedAdapter
from forkkv_cluster.engine.host_adapters import Weights

_MAX_LISTED = 16


class AdapterRegistry:
    """Registers, finds and unloads. Two names of equal content are one adapter with one place in each tier."""

    def __init__(self, tiers: AdapterTiers) -> None:
        self._tiers = tiers
        self._by_name: dict[str, AdapterInfo] = {}

    def register(self, name: str, weights: Weights) -> AdapterInfo:
        """The adapter's facts. Registering the same content under the same name again changes nothing but its path.

        Raises AlreadyExists when the name stands for other content; then nothing has changed.
        """
        named = self._by_name.get(name)
        if named is not None and named.digest != weights.info.digest:
            raise AlreadyExists("adapter", name, "It has other content: unload it first, or choose another name.")
        self._tiers.add(weights).names.add(name)
        self._by_name[name] = weights.info
        return weights.info

    def unload(self, name: str) -> None:
        """Forget the name; requests under way finish. Raises NotFound."""
        info = self._by_name.pop(name, None)
        adapter = self._tiers.find(info.digest) if info is not None else None
        if adapter is None:
            raise NotFound("adapter", name, self._known())
        adapter.names.discard(name)
        if adapter.names:  # Its weights are read again from the directory of a name that is left.
            adapter.info = self._by_name[min(adapter.names)]
        self._tiers.drop_if_unused(adapter)

    def acquire(self, ref: AdapterRef) -> LoadedAdapter:
        """The adapter for one more user. Raises NotFound unless it is loaded under some name."""
        adapter = self._tiers.find(ref.digest)
        if adapter is None or not adapter.names:
            raise NotFound("adapter", ref.name, self._known())
        adapter.num_users += 1
        return adapter

    def release(self, adapter: LoadedAdapter) -> None:
        """One user less; the last one of an unloaded adapter takes it along."""
        adapter.num_users -= 1
        self._tiers.drop_if_unused(adapter)

    def infos(self) -> tuple[AdapterInfo, ...]:
        """Every loaded adapter, by name, and whether its weights are on the device."""
        on_device = set(self._tiers.digests_on_device())
        return tuple(
            replace(info, is_resident=info.digest in on_device) for _, info in sorted(self._by_name.items(), key=lambda i: i[0])
        )

    def _known(self) -> str:
        names = sorted(self._by_name)
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        return f"Loaded here: {', '.join(names[:_MAX_LISTED]) or 'none'}{more}. Load it first."
