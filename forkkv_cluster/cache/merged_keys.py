"""Whole K of an adapter over shared context, kept in memory that nobody needs now.

Attention over base KV and a residual builds the adapter's K anew in every step. Where slabs are free, decoding borrows some
and keeps that K there: the same bytes that an isolated cache would hold for K, none for V, and only for as long as the
memory is to spare. Anyone who needs a slab gets it back before a single cached page is evicted for it.

A slab run holds two entries, one in each plane of the arena: entry (run, plane) holds K of S tokens, S
rounded up to ``KEY_BLOCK``, from the run's first element on, in every layer; in which order is for the attention to choose.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.page_pool import PagePool
from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.ids import BlockHash

IDLE_STEPS = 64
"""Steps for which a run was not used before another may take its place: sooner, a working set that is larger than the memory
would be written anew in every step."""

MIN_FREE_SHARE = 16
"""One slab in so many stays free, so that the next request finds room without taking anything back."""


KEY_BLOCK = 64
"""Tokens of which memory for whole K holds whole multiples: ops keep it in blocks of so many."""


def whole_key_blocks(num_tokens: int) -> int:
    return -(-num_tokens // KEY_BLOCK) * KEY_BLOCK


class MergedIdentity(NamedTuple):
    """Whose K over which tokens: the residual, and the chained hash of the last whole block that it covers."""

    residual: ResidualKey
    last_block: BlockHash


@dataclass(frozen=True, slots=True)
class MergedRun:
    """Where K of tokens [0, num_tokens) lies: ``plane`` of the arena, from slab ``first_slab`` on."""

    first_slab: int
    plane: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class MergedUse:
    """One step's use of a run. One that is not written yet is written by the step itself, before it is read."""

    run: MergedRun
    is_written: bool


@dataclass(slots=True, eq=False)
class _SlabRun:
    first: int
    num_slabs: int
    free_planes: list[int] = field(default_factory=lambda: [1, 0])


@dataclass(slots=True, eq=False)
class _Entry:
    run: MergedRun
    slabs: _SlabRun
    last_step: int
    is_written: bool = False


class MergedKeys:
    """Borrows slabs of one pool. ``max_share`` of the pool at most, 0 to 1. Not thread-safe."""

    def __init__(self, geometry: KVGeometry, pool: PagePool, max_share: float) -> None:
        self._geometry = geometry
        self._pool = pool
        self._max_slabs = int(max_share * pool.num_slabs)
        self._min_free = -(-pool.num_slabs // MIN_FREE_SHARE)
        self._entries: OrderedDict[MergedIdentity, _Entry] = OrderedDict()  # least recently used first
        self._runs: list[_SlabRun] = []
        self._asked: list[_Entry] = []  # of this step, those that it writes
        self._step = 0

    @property
    def num_slabs(self) -> int:
        """Slabs borrowed now."""
        return sum(run.num_slabs for run in self._runs)

    @property
    def bytes_held(self) -> int:
        return self.num_slabs * self._geometry.slab_bytes

    def is_consistent(self) -> bool:
        """Whether what is borrowed of the pool is what the entries lie in, each in a place of its own."""
        places = [(entry.run.first_slab, entry.run.plane) for entry in self._entries.values()]
        taken = {entry.slabs.first for entry in self._entries.values()}
        return (
            self.num_slabs == self._pool.num_borrowed_slabs
            and len(set(places)) == len(places)
            and taken == {run.first for run in self._runs}
        )

    def start_step(self) -> None:
        """What follows is asked for another step; what an earlier one asked for and did not write stays unwritten."""
        self._step += 1
        self._asked.clear()

    def use(self, identity: MergedIdentity, num_tokens: int, is_worth_making: bool) -> MergedUse | None:
        """K of these tokens; None where it is not there and not worth making, or there is no memory to spare for it."""
        entry = self._entries.get(identity)
        if entry is None and is_worth_making:
            entry = self._claim(num_tokens)
            if entry is not None:
                self._entries[identity] = entry
        if entry is None:
            return None
        if not entry.is_written:
            self._asked.append(entry)
        entry.last_step = self._step
        self._entries.move_to_end(identity)
        return MergedUse(entry.run, entry.is_written)

    def note_written(self) -> None:
        """The step has run all layers: what it asked for is written."""
        for entry in self._asked:
            entry.is_written = True
        self._asked.clear()

    def give_back(self) -> bool:
        """Give the least recently used run of slabs back to the pool; False when none is borrowed."""
        if not self._entries:
            return False
        slabs = next(iter(self._entries.values())).slabs
        for identity in [i for i, entry in self._entries.items() if entry.slabs is slabs]:
            del self._entries[identity]
        self._asked = [entry for entry in self._asked if entry.slabs is not slabs]
        self._runs.remove(slabs)
        self._pool.give_back(slabs.first, slabs.num_slabs)
        return True

    def _claim(self, num_tokens: int) -> _Entry | None:
        num_slabs = -(-whole_key_blocks(num_tokens) * self._geometry.base_width // self._geometry.slab_elems)
        slabs = next((run for run in self._runs if run.num_slabs == num_slabs and run.free_planes), None)
        if slabs is None:
            slabs = self._borrow(num_slabs)
        while slabs is None and self._give_back_idle():
            slabs = self._borrow(num_slabs)
        if slabs is None:
            return None
        return _Entry(MergedRun(slabs.first, slabs.free_planes.pop(), num_tokens), slabs, self._step)

    def _give_back_idle(self) -> bool:
        oldest = next(iter(self._entries.values()), None)
        if oldest is None or oldest.last_step + IDLE_STEPS > self._step:
            return False
        users = [entry.last_step for entry in self._entries.values() if entry.slabs is oldest.slabs]
        return max(users) + IDLE_STEPS <= self._step and self.give_back()

    def _borrow(self, num_slabs: int) -> _SlabRun | None:
        is_spare = self._pool.num_free_slabs - num_slabs >= self._min_free
        if not is_spare or self.num_slabs + num_slabs > self._max_slabs:
            return None
        first = self._pool.borrow(num_slabs)
        if first is None:
            return None
        run = _SlabRun(first, num_slabs)
        self._runs.append(run)
        return run
