"""Where the weights of adapters are: on disk, in host memory, in a device slot. Moves them as requests need them.

    disk  --- loader, in the background --->  host memory  --- between two steps --->  device slot

A slot is *pinned* while a sequence or a context pass runs with its adapter, and while one waits for its weights to
arrive. Pins are taken for all that a runnable needs or for nothing, and only runnables and reads under way hold any: both
end by themselves, so nobody waits for a slot in a circle. Slots without pins keep their weights until another adapter
needs the place; the least recently used goes first, those that live requests name after all others.

On a CPU a slot and the host tier hold the same tensors. Bytes are accounted separately all the same: an adapter in both is
counted in each, and what the process really holds lies between the larger of the two and their sum.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from forkkv_cluster.core.config import AdapterMemoryConfig
from forkkv_cluster.core.errors import ForkKVError, Internal
from forkkv_cluster.core.events import AdapterLoaded, AdapterUnloaded, CacheEvent
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.core.status import AdapterMemoryStatus
from forkkv_cluster.engine.adapter_loader import AdapterLoader
from forkkv_cluster.engine.host_adapters import HostAdapters, Weights


class AdapterRunner(Protocol):
    """The part of the model runner that holds weights."""

    def place_adapter(self, weights: Weights) -> int:
        """Put weights into a free slot. Cheap: called between two steps."""
        ...

    def unload_adapter(self, slot: int) -> None: ...


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """An adapter that was loaded under some name. Its weights may have left the device since, and the host too.

    info         as it was loaded last
    names        empty: unloaded, gone once the last user has ended
    num_users    live requests that name it
    num_pins     holders of its slot; see the module
    device_slot  None while its weights are not on the device
    """

    info: AdapterInfo
    residual_rank: int
    num_bytes: int
    names: set[str] = field(default_factory=set)
    num_users: int = 0
    num_pins: int = 0
    device_slot: int | None = None

    @property
    def slot(self) -> int:
        """Where its weights are on the device. Raises Internal when they are not: nothing may run with it then."""
        if self.device_slot is None:
            raise Internal(f"adapter {self.info.name!r} is scheduled while its weights are not on the device.")
        return self.device_slot


class AdapterTiers:
    """Owns slots, host tier and reads of one engine. Not thread-safe; only the loader has a thread."""

    def __init__(self, runner: AdapterRunner, config: AdapterMemoryConfig, loader: AdapterLoader) -> None:
        self._runner = runner
        self.max_slots = config.max_device_adapters
        self._loader = loader
        self._host = HostAdapters(config.host_bytes)
        self._adapters: dict[AdapterDigest, LoadedAdapter] = {}
        self._occupied: dict[AdapterDigest, LoadedAdapter] = {}  # with weights in their slot, or on their way to it
        self._idle: OrderedDict[AdapterDigest, LoadedAdapter] = OrderedDict()  # occupied, here, unpinned; oldest first
        self._loading: dict[AdapterDigest, LoadedAdapter] = {}
        self._closed: set[AdapterDigest] = set()
        self._events: list[CacheEvent] = []
        self._num_disk_loads = self._num_evictions = 0

    # --- registered adapters ----------------------------------------------------------------------------------------

    def find(self, digest: AdapterDigest) -> LoadedAdapter | None:
        """The adapter of this content, unloaded ones that still have users included."""
        return self._adapters.get(digest)

    def add(self, weights: Weights) -> LoadedAdapter:
        """Content that has just been read: kept in host memory, and in a slot as long as one is free."""
        digest = weights.info.digest
        self._host.put(weights)
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = LoadedAdapter(weights.info, weights.residual_rank, weights.num_bytes)
            self._adapters[digest] = adapter
        adapter.info = weights.info
        if digest not in self._occupied and len(self._occupied) < self.max_slots:
            self._occupied[digest] = adapter
            self._place(adapter, weights)
        return adapter

    def drop_if_unused(self, adapter: LoadedAdapter) -> None:
        """Forget an adapter that has no name, no user and no pin."""
        if adapter.names or adapter.num_users or adapter.num_pins:
            return
        digest = adapter.info.digest
        del self._adapters[digest]
        self._host.drop(digest)
        self._loading.pop(digest, None)  # its result will be nobody's
        if digest in self._occupied:
            self._vacate(adapter)

    def digests_on_device(self) -> tuple[AdapterDigest, ...]:
        return tuple(digest for digest, adapter in self._occupied.items() if adapter.device_slot is not None)

    # --- slots ------------------------------------------------------------------------------------------------------

    def can_pin(self, adapter: LoadedAdapter) -> bool:
        """Whether ``pin`` of it alone would succeed now."""
        digest = adapter.info.digest
        if digest in self._occupied:
            return digest not in self._closed
        return len(self._occupied) < self.max_slots or bool(self._idle)

    def pin(self, required: Sequence[LoadedAdapter], optional: Sequence[LoadedAdapter] = (), least: int | None = None
            ) -> tuple[LoadedAdapter, ...] | None:  # fmt: skip
        """Hold slots for adapters, starting reads for those that are on disk alone.

        For as many of ``required`` as there is room for, but ``least`` of them (None: all) or nothing; then for as many
        of ``optional`` as have room besides. Returns those pinned, None for nothing.
        """
        room = self.max_slots - len(self._occupied) + len(self._idle)
        chosen: dict[AdapterDigest, LoadedAdapter] = {}
        num_required = 0
        for index, adapter in enumerate((*required, *optional)):
            digest = adapter.info.digest
            if digest not in chosen:
                costs_room = digest in self._idle or digest not in self._occupied
                if digest in self._closed or (costs_room and not room):
                    continue
                room -= costs_room
                chosen[digest] = adapter
            num_required += index < len(required)
        if num_required < (len(required) if least is None else least):
            return None
        for adapter in chosen.values():
            adapter.num_pins += 1
            self._idle.pop(adapter.info.digest, None)
        for adapter in chosen.values():
            if adapter.info.digest not in self._occupied:
                self._occupy(adapter)
        return tuple(chosen.values())

    def unpin(self, adapters: Iterable[LoadedAdapter]) -> None:
        for adapter in adapters:
            adapter.num_pins -= 1
            if adapter.num_pins == 0 and adapter.device_slot is not None:
                self._idle[adapter.info.digest] = adapter
            self.drop_if_unused(adapter)

    def close_slot(self, chosen: LoadedAdapter | None) -> LoadedAdapter | None:
        """Let a pinned slot run empty: nobody pins it from here on, until ``reopen``. ``chosen`` again while it is pinned,
        else the one with the fewest pins; None when all are closed."""
        if chosen is None or not chosen.num_pins or chosen.info.digest in self._closed:
            open_ones = [a for digest, a in self._occupied.items() if a.num_pins and digest not in self._closed]
            chosen = min(open_ones, key=lambda a: a.num_pins, default=None)
        if chosen is not None:
            self._closed.add(chosen.info.digest)
        return chosen

    def reopen(self) -> None:
        self._closed.clear()

    def _occupy(self, adapter: LoadedAdapter) -> None:
        if len(self._occupied) >= self.max_slots:
            self._vacate(next((a for a in self._idle.values() if not a.num_users), next(iter(self._idle.values()))))
            self._num_evictions += 1
        self._occupied[adapter.info.digest] = adapter
        weights = self._host.get(adapter.info.digest)
        if weights is not None:
            self._place(adapter, weights)
        else:
            self._loading[adapter.info.digest] = adapter
            self._num_disk_loads += 1
            self._loader.submit(adapter.info)

    def _place(self, adapter: LoadedAdapter, weights: Weights) -> None:
        adapter.device_slot = self._runner.place_adapter(weights)
        self._events.append(AdapterLoaded(adapter.info.digest))
        if not adapter.num_pins:
            self._idle[adapter.info.digest] = adapter

    def _vacate(self, adapter: LoadedAdapter) -> None:
        digest = adapter.info.digest
        del self._occupied[digest]
        self._idle.pop(digest, None)
        if adapter.device_slot is not None:
            self._runner.unload_adapter(adapter.device_slot)
            adapter.device_slot = None
            self._events.append(AdapterUnloaded(digest))

    # --- reads from disk --------------------------------------------------------------------------------------------

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    def settle(self) -> list[tuple[LoadedAdapter, ForkKVError]]:
        """Put what has been read into its slots; returns what could not be read. Its pins are the caller's to take back."""
        failed = []
        for result in self._loader.take():
            adapter = self._loading.pop(result.digest, None)
            if adapter is None:
                continue  # unloaded meanwhile
            if result.weights is not None:
                self._host.put(result.weights)
                self._place(adapter, result.weights)
            elif result.error is not None:
                self._vacate(adapter)
                failed.append((adapter, result.error))
        return failed

    def wait(self, timeout_s: float) -> None:
        """Until a read has ended, at most this long."""
        self._loader.wait(timeout_s)

    # --- facts ------------------------------------------------------------------------------------------------------

    def take_events(self) -> list[CacheEvent]:
        """Weights that came to the device or left it since the last call."""
        events, self._events = self._events, []
        return events

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def status(self) -> AdapterMemoryStatus:
        here = [adapter for adapter in self._occupied.values() if adapter.device_slot is not None]
        return AdapterMemoryStatus(
            num_registered=len(self._adapters),
            max_on_device=self.max_slots,
            num_on_device=len(here),
            num_pinned=sum(1 for adapter in here if adapter.num_pins),
            num_loading=len(self._loading),
            device_bytes=sum(adapter.num_bytes for adapter in here),
            num_on_host=len(self._host),
            host_bytes=self._host.num_bytes,
            max_host_bytes=self._host.max_bytes,
            disk_loads=self._num_disk_loads,
            device_evictions=self._num_evictions,
        )

    def check_invariants(self, claims: Sequence[LoadedAdapter]) -> None:
        """``claims``: every pin that a runnable or a waiting request holds. Raises Internal on a contradiction."""
        problems = []
        if len(self._occupied) > self.max_slots:
            problems.append(f"{len(self._occupied)} of {self.max_slots} slots are occupied")
        if self._host.num_bytes != self._host.counted_bytes() or self._host.num_bytes > self._host.max_bytes:
            problems.append(f"{self._host.num_bytes} host bytes are counted, {self._host.counted_bytes()} are held")
        for digest, adapter in self._adapters.items():
            held = sum(1 for claim in claims if claim is adapter)
            is_here, is_loading = adapter.device_slot is not None, digest in self._loading
            if held != adapter.num_pins:
                problems.append(f"adapter {digest} has {adapter.num_pins} pins, {held} are held")
            if (digest in self._occupied) != (is_here or is_loading) or (is_here and is_loading):
                problems.append(f"adapter {digest} has a slot without weights, or weights without a slot")
            if (digest in self._idle) != (is_here and not adapter.num_pins):
                problems.append(f"adapter {digest} is on the wrong side of eviction")
        if problems:
            raise Internal(f"adapter memory contradicts itself: {'; '.join(problems)}.")
