"""KV memory of a fake device: pages of every class and borrowed whole K lie in the same slabs, as on a real one.

A slab holds pages of one class, or whole K. Writing into it as something else destroys all that it held, so memory that two
owners believe to have reads as nothing, or as something else, for one of them: whatever is read wrongly fails here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.merged_keys import MergedRun, whole_key_blocks
from forkkv_cluster.cache.page_pool import PageClass

_WHOLE_KEYS = -1  # no page class has this number


class WrongKV(AssertionError):
    """A step reads what is not there, or not what it should be."""


@dataclass(frozen=True, slots=True)
class _WholeKeys:
    """values [tokens]: what each was made of. ``is_complete``: in all layers, not in all but the last."""

    values: tuple[str, ...]
    is_complete: bool


class FakeKVMemory:
    """Values by slot (page * page_size + offset) of each class, and by position of each run of whole K."""

    def __init__(self, geometry: KVGeometry) -> None:
        self._geometry = geometry
        self._pages: dict[tuple[PageClass, int], str] = {}
        self._runs: dict[MergedRun, _WholeKeys] = {}
        self._kinds: dict[int, PageClass] = {}  # slab -> page class, or _WHOLE_KEYS

    # --- pages ------------------------------------------------------------------------------------------------------

    def write(self, page_class: PageClass, slot: int, value: str) -> None:
        self._claim(slot // self._slots_per_slab(page_class), page_class)
        self._pages[page_class, slot] = value

    def read(self, page_class: PageClass, slot: int) -> str:
        """Raises WrongKV for a slot that holds nothing."""
        value = self._pages.get((page_class, slot))
        if value is None:
            raise WrongKV(f"slot {slot} of class {page_class} is read and holds nothing")
        return value

    def pop(self, page_class: PageClass, slot: int) -> str | None:
        """What the slot holds, if anything; it holds nothing then."""
        return self._pages.pop((page_class, slot), None)

    # --- whole K ----------------------------------------------------------------------------------------------------

    def write_whole_keys(self, run: MergedRun, values: Sequence[str], *, is_complete: bool) -> None:
        """values [tokens] of positions 0, 1, ... . Not ``is_complete``: the last layer is missing."""
        slabs = self._slabs(run)
        for slab in slabs:
            self._claim(slab, _WHOLE_KEYS)
        for other in [r for r in self._runs if r.plane == run.plane and _overlap(self._slabs(r), slabs)]:
            del self._runs[other]
        self._runs[run] = _WholeKeys(tuple(values), is_complete)

    def check_whole_key(self, run: MergedRun, position: int, expected: str, *, needs_all_layers: bool) -> None:
        """Raises WrongKV unless K of this position is there and made of what it should be."""
        held = self._runs.get(run)
        if held is None or position >= len(held.values):
            raise WrongKV(f"whole K of position {position} in {run} is read and was never written, or was overwritten")
        if held.values[position] != expected:
            raise WrongKV(f"whole K of position {position} in {run} belongs to another adapter or other tokens")
        if needs_all_layers and not held.is_complete:
            raise WrongKV(f"whole K of position {position} in {run} is read and lacks its last layer")

    # --- slabs ------------------------------------------------------------------------------------------------------

    def _claim(self, slab: int, kind: PageClass) -> None:
        held = self._kinds.get(slab, kind)
        self._kinds[slab] = kind
        if held == kind:
            return
        if held == _WHOLE_KEYS:
            for run in [r for r in self._runs if slab in self._slabs(r)]:
                del self._runs[run]
            return
        per_slab = self._slots_per_slab(held)
        for slot in range(slab * per_slab, (slab + 1) * per_slab):
            self._pages.pop((held, slot), None)

    def _slots_per_slab(self, page_class: PageClass) -> int:
        return self._geometry.pages_per_slab(page_class) * self._geometry.page_size

    def _slabs(self, run: MergedRun) -> range:
        num_slabs = -(-whole_key_blocks(run.num_tokens) * self._geometry.base_width // self._geometry.slab_elems)
        return range(run.first_slab, run.first_slab + num_slabs)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
