"""How requests with ``sharing: auto`` are served on one adapter, and why. Pure values and the rule that picks.

The reference of an adapter is the sharing that loses nothing: what its metadata says it was trained for, else ``isolated``.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.request import Sharing

CHEAPEST_FIRST = (Sharing.BASE, Sharing.EAGER, Sharing.RESIDUAL, Sharing.ISOLATED)
"""By what the first fork costs: nothing, nothing but residual memory, a prefill and little memory, a prefill and a copy."""


class VerdictState(enum.StrEnum):
    """How the verdict came about.

    UNMEASURED   the adapter was registered without ``auto``: served by its reference
    NAMED        whoever registered it named a sharing
    EXACT        an aLoRA: every sharing is exact
    WAITING      measured once it has been used: served by its reference until then
    CALIBRATING  being measured: served by its reference meanwhile
    MEASURED     picked within the bound
    DEMOTED      picked once; what was served since drifted beyond the bound
    """

    UNMEASURED = "unmeasured"
    NAMED = "named"
    EXACT = "exact"
    WAITING = "waiting"
    CALIBRATING = "calibrating"
    MEASURED = "measured"
    DEMOTED = "demoted"


@dataclass(frozen=True, slots=True)
class PolicyAgreement:
    """One sharing against the reference."""

    sharing: Sharing
    agreement: Agreement


@dataclass(frozen=True, slots=True)
class SharingVerdict:
    """``sharing`` is how ``auto`` is served now.

    reference         the sharing that is taken to lose nothing
    reason            one sentence for people
    max_disagreement  the operator's bound that held
    measured          what was measured, cheapest first
    samples           where the sample contexts came from
    decided_s         unix seconds; 0 while nothing was decided by measuring
    """

    sharing: Sharing
    state: VerdictState
    reference: Sharing
    reason: str
    max_disagreement: float = 0.0
    measured: tuple[PolicyAgreement, ...] = ()
    samples: str = ""
    decided_s: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to say but that nothing was measured, or is yet."""
        return self.state in (VerdictState.UNMEASURED, VerdictState.WAITING)

    def of(self, sharing: Sharing) -> Agreement | None:
        """What was measured of ``sharing``."""
        return next((entry.agreement for entry in self.measured if entry.sharing is sharing), None)

    def demoted(self, drift: Agreement, decided_s: float) -> SharingVerdict:
        """Back to the reference: what ``sharing`` served has drifted."""
        reason = (
            f"{self.sharing} drifted: {drift.num_disagreements} of {drift.num_positions} served positions disagree with "
            f"{self.reference}, at least {drift.lower_bound:.2%} with 95 % confidence, beyond {self.max_disagreement:.2%}"
        )
        return replace(
            self, sharing=self.reference, state=VerdictState.DEMOTED, reason=reason, decided_s=decided_s
        )  # fmt: skip


def decide(
    reference: Sharing,
    measured: Sequence[PolicyAgreement],
    *,
    max_disagreement: float,
    min_positions: int,
    samples: str,
    decided_s: float,
    failure: str = "",
) -> SharingVerdict:
    """The cheapest sharing whose upper bound keeps to ``max_disagreement`` over ``min_positions``, else the reference.

    The reference loses nothing against itself, and what is picked is cheaper. ``failure`` says why measuring ended too early:
    then nothing is picked.
    """
    ordered = tuple(sorted(measured, key=lambda entry: CHEAPEST_FIRST.index(entry.sharing)))
    cheaper = [e for e in ordered if CHEAPEST_FIRST.index(e.sharing) < CHEAPEST_FIRST.index(reference)]
    enough = [entry for entry in cheaper if entry.agreement.num_positions >= min_positions and not failure]
    picked = next((entry for entry in enough if entry.agreement.upper_bound <= max_disagreement), None)
    if picked is not None:
        reason = (
            f"{picked.sharing} disagrees with {reference} on at most {picked.agreement.upper_bound:.2%} of positions, "
            f"within {max_disagreement:.2%}"
        )
    else:
        reason = failure or _why_none(reference, cheaper, enough, max_disagreement, min_positions)
    sharing = picked.sharing if picked is not None else reference
    return SharingVerdict(sharing, VerdictState.MEASURED, reference, reason, max_disagreement, ordered, samples, decided_s)


def _why_none(
    reference: Sharing,
    cheaper: Sequence[PolicyAgreement],
    enough: Sequence[PolicyAgreement],
    max_disagreement: float,
    min_positions: int,
) -> str:
    if enough:
        best = min(enough, key=lambda entry: entry.agreement.upper_bound)
        return (
            f"no cheaper sharing keeps to {max_disagreement:.2%}: the best, {best.sharing}, disagrees with {reference} on up "
            f"to {best.agreement.upper_bound:.2%} of positions"
        )
    if cheaper:
        most = max(entry.agreement.num_positions for entry in cheaper)
        return f"only {most} positions were compared, of at least {min_positions}"
    if reference is Sharing.ISOLATED:
        return "no sharing can serve this adapter"
    return f"it was trained for {reference}, which loses nothing against itself, and nothing cheaper is measured"


def unmeasured(reference: Sharing) -> SharingVerdict:
    """Of an adapter that was registered without a word on sharing."""
    reason = "not measured: load it with sharing auto"
    if reference is not Sharing.ISOLATED:
        reason = f"its metadata says that it was trained for {reference}"
    return SharingVerdict(reference, VerdictState.UNMEASURED, reference, reason)


def merged(verdicts: Iterable[SharingVerdict]) -> SharingVerdict | None:
    """What a cluster goes by where workers say different things: a demotion, else the dearest of those that are decided,
    else any; None of none."""
    known = list(verdicts)
    demoted = [verdict for verdict in known if verdict.state is VerdictState.DEMOTED]
    decided = [verdict for verdict in known if verdict.state not in (VerdictState.WAITING, VerdictState.CALIBRATING)]
    candidates = demoted or decided or known
    return max(candidates, key=lambda verdict: _caution(verdict), default=None)


def _caution(verdict: SharingVerdict) -> int:
    is_reference = verdict.sharing is verdict.reference
    return len(CHEAPEST_FIRST) if is_reference else CHEAPEST_FIRST.index(verdict.sharing)
