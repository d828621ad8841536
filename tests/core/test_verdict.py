"""Which sharing ``auto`` comes to, from what was measured and the operator's bound."""

from __future__ import annotations

import pytest

from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.core.verdict import PolicyAgreement, SharingVerdict, VerdictState, decide, merged, unmeasured


def verdict(
    reference: Sharing = Sharing.ISOLATED, *, positions: int = 2000, bound: float = 0.02, failure: str = "", **wrong: int
) -> SharingVerdict:
    """``wrong`` disagreements by sharing."""
    measured = [PolicyAgreement(Sharing(name), Agreement(positions, count)) for name, count in wrong.items()]
    return decide(
        reference,
        measured,
        max_disagreement=bound,
        min_positions=2000,
        samples="some file",
        decided_s=12.0,
        failure=failure,
    )


def test_the_cheapest_within_the_bound_is_picked() -> None:
    found = verdict(residual=0, eager=3)
    assert (found.sharing, found.state, found.samples, found.decided_s) == (
        Sharing.EAGER,
        VerdictState.MEASURED,
        "some file",
        12.0,
    )
    assert [entry.sharing for entry in found.measured] == [Sharing.EAGER, Sharing.RESIDUAL]


def test_a_dearer_one_is_picked_where_the_cheapest_loses_too_much() -> None:
    assert verdict(eager=100, residual=3).sharing is Sharing.RESIDUAL


def test_none_within_the_bound_leaves_the_adapter_isolated_and_says_how_far_the_best_is_off() -> None:
    found = verdict(eager=200, residual=300)
    assert found.sharing is Sharing.ISOLATED
    assert "eager, disagrees with isolated on up to 11.16%" in found.reason


def test_it_is_the_upper_bound_that_counts_not_what_was_seen() -> None:
    # 1.7 % were seen: below 2 %, but up to 2.2 % is likely enough.
    assert Agreement(2000, 34).disagreement < 0.02 < Agreement(2000, 34).upper_bound
    assert verdict(eager=34).sharing is Sharing.ISOLATED
    assert verdict(eager=34, bound=0.03).sharing is Sharing.EAGER


def test_too_few_positions_share_nothing_whatever_they_say() -> None:
    found = verdict(positions=1999, eager=0)
    assert found.sharing is Sharing.ISOLATED
    assert found.reason == "only 1999 positions were compared, of at least 2000"


def test_a_measurement_that_failed_shares_nothing_and_says_why() -> None:
    found = verdict(eager=0, failure="it did not end")
    assert (found.sharing, found.reason) == (Sharing.ISOLATED, "it did not end")


def test_an_adapter_trained_for_a_sharing_is_served_so_and_never_by_a_dearer_one() -> None:
    found = verdict(Sharing.EAGER, isolated=0, residual=0)
    assert found.sharing is Sharing.EAGER
    assert "trained for eager, which loses nothing against itself" in found.reason


def test_an_adapter_trained_for_residual_is_served_eager_where_both_agree() -> None:
    assert verdict(Sharing.RESIDUAL, eager=0, isolated=900).sharing is Sharing.EAGER
    assert verdict(Sharing.RESIDUAL, eager=900, isolated=0).sharing is Sharing.RESIDUAL


def test_no_sharing_that_could_serve_it_leaves_it_isolated() -> None:
    assert verdict().reason == "no sharing can serve this adapter"


def test_a_demotion_goes_back_to_the_reference_and_keeps_the_figures() -> None:
    picked = verdict(eager=3)
    found = picked.demoted(Agreement(600, 60), 20.0)
    assert (found.sharing, found.state, found.decided_s) == (Sharing.ISOLATED, VerdictState.DEMOTED, 20.0)
    assert found.measured == picked.measured
    assert "60 of 600 served positions disagree with isolated" in found.reason


def calibrating() -> SharingVerdict:
    return SharingVerdict(Sharing.ISOLATED, VerdictState.CALIBRATING, Sharing.ISOLATED, "")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ([], None),
        ([verdict(eager=3), calibrating()], Sharing.EAGER),  # one that measures still does not hold up the others
        ([calibrating(), calibrating()], Sharing.ISOLATED),
        ([verdict(eager=3), verdict(eager=300)], Sharing.ISOLATED),
        ([verdict(eager=3), verdict(eager=300, residual=3)], Sharing.RESIDUAL),
        ([verdict(eager=3), verdict(eager=3).demoted(Agreement(600, 60), 1.0), verdict(eager=3)], Sharing.ISOLATED),
        ([unmeasured(Sharing.EAGER)], Sharing.EAGER),
    ],
)
def test_of_workers_that_differ_the_most_cautious_one_holds(said: list[SharingVerdict], wanted: Sharing | None) -> None:
    found = merged(said)
    assert (found.sharing if found is not None else None) is wanted


def test_a_worker_that_waits_for_the_first_use_does_not_hold_back_one_that_has_measured() -> None:
    measured = verdict(eager=0)
    waiting = SharingVerdict(Sharing.ISOLATED, VerdictState.WAITING, Sharing.ISOLATED, "measured once it has been used")
    assert waiting.is_plain
    assert not measured.is_plain
    assert merged([waiting, measured, waiting]) == measured
    assert merged([waiting]) == waiting
