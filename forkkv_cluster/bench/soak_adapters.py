"""Adapters of a soak run: loaded, unloaded and loaded again, under the same names with other content."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from forkkv_cluster.bench.soak_ledger import SoakFailure
from forkkv_cluster.core.errors import AlreadyExists, NotFound
from forkkv_cluster.core.events import AdapterLoaded
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterRef
from forkkv_cluster.engine.engine import Engine

_MIN_LOADED = 2


class AdapterChurn:
    """``contents``: name -> the directories that take turns under it. Two names may have the same content."""

    def __init__(self, engine: Engine, contents: Mapping[str, Sequence[str]], rng: random.Random) -> None:
        self._engine = engine
        self._contents = contents
        self._rng = rng
        self._loaded: dict[str, AdapterRef] = {}
        self.paths: dict[AdapterDigest, str] = {}
        for name in contents:
            self._load(name, contents[name][0])

    @property
    def refs(self) -> list[AdapterRef]:
        """Those that can be asked for now."""
        return list(self._loaded.values())

    def is_loaded(self, ref: AdapterRef) -> bool:
        return any(loaded.digest == ref.digest for loaded in self._loaded.values())

    # --- actions ----------------------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Unload a name and load it again at once, with any of its contents."""
        name = self._rng.choice(sorted(self._loaded))
        self._unload(name)
        self._load(name, self._rng.choice(self._contents[name]))

    def unload(self) -> None:
        if len(self._loaded) > _MIN_LOADED:
            self._unload(self._rng.choice(sorted(self._loaded)))

    def load(self) -> None:
        missing = sorted(set(self._contents) - set(self._loaded))
        if missing:
            name = self._rng.choice(missing)
            self._load(name, self._rng.choice(self._contents[name]))

    def load_again(self) -> None:
        """The same content under the same name changes nothing; other content is refused."""
        ref = self._rng.choice(self.refs)
        path = self._rng.choice(self._contents[ref.name])
        try:
            info = self._engine.load_adapter(ref.name, path)
        except AlreadyExists:
            if self.paths[ref.digest] == path:
                raise SoakFailure("adapters", f"{ref.name} with the content that it has was refused") from None
            return
        if info.digest != ref.digest:
            raise SoakFailure("adapters", f"{ref.name} got other content without being unloaded")

    def unload_unknown(self) -> None:
        try:
            self._engine.unload_adapter("never-loaded")
        except NotFound:
            return
        raise SoakFailure("adapters", "an unknown name was unloaded")

    # --- checks -----------------------------------------------------------------------------------------------------

    def check_idle(self) -> None:
        """With no request under way, weights are on the device for names that are loaded and for no other."""
        named = {ref.digest for ref in self._loaded.values()}
        held = {event.adapter for event in self._engine.snapshot_events() if isinstance(event, AdapterLoaded)}
        if held - named:
            raise SoakFailure("adapter references", f"weights held without a name or user: {sorted(held - named)}")

    def check_droppable(self) -> None:
        """Unloaded all at once, no weights stay: no reference was left behind. They are loaded again."""
        names = {ref.name: self.paths[ref.digest] for ref in self._loaded.values()}
        for name in names:
            self._unload(name)
        self.check_idle()
        for name, path in names.items():
            self._load(name, path)

    def _load(self, name: str, path: str) -> None:
        info = self._engine.load_adapter(name, path)
        self._loaded[name] = info.ref
        self.paths[info.digest] = path

    def _unload(self, name: str) -> None:
        self._engine.unload_adapter(name)
        del self._loaded[name]
