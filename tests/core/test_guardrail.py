"""Sliding windows of shadow probes, and when their drift is too much."""

from __future__ import annotations

import pytest

from forkkv_cluster.core.agreement import Agreement, TextAgreement
from forkkv_cluster.core.guardrail import DriftKey, DriftWindow, Guardrail, is_chosen
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import Sharing

KEY = DriftKey(AdapterDigest("a" * 32), Sharing.EAGER)
OTHER = DriftKey(AdapterDigest("a" * 32), Sharing.RESIDUAL)


def probe(positions: int, wrong: int, first: int | None = None, kl: float = 0.0) -> TextAgreement:
    return TextAgreement(Agreement(positions, wrong, kl), first if first is not None else (0 if wrong else None))


def test_a_window_forgets_the_oldest_probes_that_it_does_not_need_for_its_positions() -> None:
    window = DriftWindow(100)
    for wrong in (40, 0, 0, 0):
        window.add(probe(40, wrong))
    assert (window.num_probes, window.total) == (3, Agreement(120, 0))


def test_a_window_is_never_emptied_by_a_probe_larger_than_it() -> None:
    window = DriftWindow(10)
    window.add(probe(5, 0))
    window.add(probe(50, 5))
    assert (window.num_probes, window.total) == (1, Agreement(50, 5))


def test_a_window_tells_how_many_probes_diverged_and_where_the_middle_one_did() -> None:
    window = DriftWindow(1000)
    for first in (None, 30, 2, None, 7):
        window.add(probe(40, int(first is not None), first, kl=0.5))
    assert (window.num_diverged, window.first_divergence) == (3, 7)
    assert window.total == Agreement(200, 3, 2.5)
    assert DriftWindow(10).first_divergence is None


def test_drift_beyond_the_bound_is_told_once_there_is_enough_of_it() -> None:
    guardrail = Guardrail(window_positions=4096, min_positions=512)
    for _ in range(12):
        guardrail.note(KEY, probe(40, 4))
        assert not guardrail.is_beyond(KEY, 0.02)  # 480 positions: not enough, though a tenth of them disagree
    guardrail.note(KEY, probe(40, 4))
    assert guardrail.is_beyond(KEY, 0.02)
    assert not guardrail.is_beyond(KEY, 0.2)
    assert not guardrail.is_beyond(OTHER, 0.02)


def test_disagreement_that_may_be_chance_is_no_drift() -> None:
    guardrail = Guardrail(window_positions=4096, min_positions=500)
    guardrail.note(KEY, probe(500, 13))  # 2.6 %: above 2 %, but with 95 % confidence only above 1.6 %
    assert not guardrail.is_beyond(KEY, 0.02)
    guardrail.note(KEY, probe(3500, 91))  # the same share of eight times as many
    assert guardrail.is_beyond(KEY, 0.02)


def test_drift_that_is_over_is_forgotten_with_its_window() -> None:
    guardrail = Guardrail(window_positions=1000, min_positions=500)
    guardrail.note(KEY, probe(500, 100))
    assert guardrail.is_beyond(KEY, 0.02)
    for _ in range(4):
        guardrail.note(KEY, probe(500, 0))
    assert not guardrail.is_beyond(KEY, 0.02)


def test_an_unloaded_adapter_is_forgotten_under_every_sharing() -> None:
    guardrail = Guardrail(window_positions=1000, min_positions=1)
    kept = DriftKey(AdapterDigest("b" * 32), Sharing.EAGER)
    for key in (KEY, OTHER, kept):
        guardrail.note(key, probe(10, 1))
    guardrail.forget(KEY.adapter)
    assert [key for key, _ in guardrail.windows()] == [kept]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_as_many_requests_are_chosen_as_the_share_says(share: float) -> None:
    chosen = sum(is_chosen(f"request-{number}", share) for number in range(4000))
    assert chosen == pytest.approx(4000 * share, abs=5 * (4000 * share * (1 - share)) ** 0.5)


def test_a_choice_is_the_same_wherever_it_is_made() -> None:
    assert [is_chosen(f"r{n}", 0.5) for n in range(8)] == [is_chosen(f"r{n}", 0.5) for n in range(8)]
    assert all(is_chosen(f"r{n}", 0.6) for n in range(200) if is_chosen(f"r{n}", 0.3))
