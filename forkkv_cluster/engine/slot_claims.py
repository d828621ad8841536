"""Slots on behalf of requests that want to start: who holds which, who waits for one, and for how long at most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from forkkv_cluster.engine.adapter_tiers import AdapterTiers, LoadedAdapter
from forkkv_cluster.engine.context_planner import PassPlan
from forkkv_cluster.engine.sequence import ContextNeeds, Turn, Waiting
from forkkv_cluster.engine.step_plan import Outcome


class SlotClaims:
    """Pins for waiting requests, in ``Place.claim``. A request that waits holds pins only while it waits for weights to
    arrive: one that cannot start for another reason lets go, so that nobody waits for a slot that nobody uses."""

    def __init__(self, tiers: AdapterTiers, max_overtakes: int) -> None:
        self._tiers = tiers
        self._max_overtakes = max_overtakes
        self._without_slot: list[Waiting] = []

    # --- claims -----------------------------------------------------------------------------------------------------

    def claim_turn(self, turn: Turn) -> Outcome | None:
        """A slot for the turn's own adapter; None once its weights are there, else what the turn waits for."""
        blocked = self._claim(turn, (turn.adapter,) if turn.adapter is not None else (), (), 1)
        if blocked is None:  # What it held for a pass that it needs no more is of no use to it.
            others = [adapter for adapter in turn.place.claim if adapter is not turn.adapter]
            turn.place.claim = (turn.adapter,) if turn.adapter is not None else ()
            self._tiers.unpin(others)
        return blocked

    def claim_pass(self, entry: Waiting, wanted: PassPlan) -> Outcome | None:
        """Slots for a pass. One that writes the residuals of more adapters than have slots takes as many as it can get,
        and another pass writes the rest; so that this is few passes, it waits until half of the slots are to be had, but
        for no more than ``max_overtakes`` others."""
        if wanted.adapter is not None:
            return self._claim(entry, (wanted.adapter,), (), 1)
        least = 1 if self._is_overdue(entry) else max(1, self._tiers.max_slots // 2)
        return self._claim(entry, [t.adapter for t in wanted.required], [t.adapter for t in wanted.optional], least)

    def _claim(
        self, entry: Waiting, required: Sequence[LoadedAdapter], optional: Sequence[LoadedAdapter], least: int
    ) -> Outcome | None:
        place, least = entry.place, min(least, len(required))
        if not place.claim or sum(adapter in place.claim for adapter in required) < least:
            self.let_go(entry)
            claim = self._tiers.pin(required, optional, least)
            if claim is None:
                return Outcome.NO_SLOT
            place.claim = claim
        return None if place.is_ready else Outcome.WAITS

    def can_claim(self, entry: Waiting) -> bool:
        """False for a turn whose adapter would get no slot now; told without looking at anything else."""
        if not isinstance(entry, Turn) or entry.adapter is None or entry.place.claim:
            return True
        return self._tiers.can_pin(entry.adapter)

    def let_go(self, entry: Waiting) -> None:
        claim, entry.place.claim = entry.place.claim, ()
        self._tiers.unpin(claim)

    # --- overtaking -------------------------------------------------------------------------------------------------

    def begin_admission(self) -> None:
        """Before the queue is walked, from the first candidate to the last."""
        self._without_slot.clear()
        self._tiers.reopen()

    def note_no_slot(self, entry: Waiting) -> None:
        """Candidates after this one may overtake it. Once too many have, a slot is closed to them until it is empty."""
        self._without_slot.append(entry)
        if self._is_overdue(entry):
            entry.place.emptied = self._tiers.close_slot(entry.place.emptied)

    def note_start(self, claim: tuple[LoadedAdapter, ...]) -> None:
        """Something starts with these slots, before all that came earlier and have none."""
        if claim:
            for overtaken in self._without_slot:
                overtaken.place.num_overtaken += 1

    def _is_overdue(self, entry: Waiting) -> bool:
        return entry.place.num_overtaken >= self._max_overtakes

    # --- weights that could not be read -----------------------------------------------------------------------------

    def fail_load(self, adapter: LoadedAdapter, waiting: Iterable[Waiting]) -> list[Waiting]:
        """Takes its slot from all that wait for it; returns those that cannot do without. The others go on without its
        residual, which concerns its own branches alone."""
        failed = []
        for entry in waiting:
            if adapter not in entry.place.claim:
                continue
            self.let_go(entry)
            needs = entry.needs
            is_writer = needs is not None and needs.writer_adapter is adapter
            if is_writer or (isinstance(entry, Turn) and entry.adapter is adapter):
                failed.append(entry)
            elif needs is not None:
                entry.needs = _without(needs, adapter)
        return failed


def _without(needs: ContextNeeds, adapter: LoadedAdapter) -> ContextNeeds:
    return replace(
        needs,
        required=tuple(t for t in needs.required if t.adapter is not adapter),
        optional=tuple(t for t in needs.optional if t.adapter is not adapter),
    )
