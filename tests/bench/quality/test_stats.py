"""Intervals against values from the literature and against what must hold of any interval."""

from __future__ import annotations

import numpy as np
import pytest

from forkkv_cluster.bench.quality.stats import Pairs, bootstrap_mean, paired_loss, wilson


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_share_has_the_published_wilson_interval(hits: int, trials: int, low: float, high: float):
    found = wilson(hits, trials)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert found.value == hits / trials


def test_a_paired_loss_has_the_published_interval():
    # Newcombe 1998, Statistics in Medicine 17:2635, table II, method 10, (e, f, g, h) = (36, 12, 2, 0).
    found = paired_loss(Pairs(36, 12, 2, 0))
    assert found.value == pytest.approx(0.2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0569, 0.3404)


def test_a_paired_loss_changes_its_sign_with_its_sides():
    forth, back = paired_loss(Pairs(20, 6, 2, 9)), paired_loss(Pairs(20, 2, 6, 9))
    assert (back.value, back.low, back.high) == pytest.approx((-forth.value, -forth.high, -forth.low))


def test_pairs_are_counted_and_add_up():
    found = Pairs.of([True, True, True, False, False], [True, False, True, True, False])
    assert found == Pairs(both=2, lost=1, gained=1, neither=1)
    assert found.plus(Pairs(1, 2, 3, 4)) == Pairs(3, 3, 4, 5)
    with pytest.raises(ValueError, match="is longer"):
        Pairs.of([True], [True, False])


def test_samples_on_which_all_agree_leave_room_for_a_loss():
    found = paired_loss(Pairs.of([True] * 20, [True] * 20))
    assert found.value == 0.0
    assert found.low < 0.0 < found.high < 0.25


def test_pairs_that_go_together_say_more_than_the_same_shares_apart():
    together, apart = paired_loss(Pairs(25, 2, 0, 23)), paired_loss(Pairs(14, 13, 11, 12))
    assert together.value == apart.value
    assert together.high - together.low < apart.high - apart.low


def test_a_bootstrap_repeats_with_its_seed_and_nears_the_normal_interval():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    found = bootstrap_mean(values, seed=7)
    assert found == bootstrap_mean(values, seed=7)
    error = values.std() / 20
    assert found.value == values.mean()
    assert (found.low, found.high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.05)


@pytest.mark.parametrize("estimate", [lambda: wilson(0, 0), lambda: bootstrap_mean([], 0), lambda: paired_loss(Pairs())])
def test_nothing_has_no_interval(estimate):
    with pytest.raises(ValueError, match="no "):
        estimate()
