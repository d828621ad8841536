"""Intervals against values from the literature and against what must hold of any interval."""

from __future__ import annotations

import numpy as np
import pytest

from forkkv_cluster.bench.quality.stats import bootstrap_mean, paired_loss, wilson


def pairs(both: int, only_one: int, only_two: int, neither: int) -> tuple[list[bool], list[bool]]:
    one = [True] * both + [True] * only_one + [False] * only_two + [False] * neither
    two = [True] * both + [False] * only_one + [True] * only_two + [False] * neither
    return one, two


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
    found = paired_loss(*pairs(36, 12, 2, 0))
    assert found.value == pytest.approx(0.2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0569, 0.3404)


def test_a_paired_loss_changes_its_sign_with_its_sides():
    one, two = pairs(20, 6, 2, 9)
    forth, back = paired_loss(one, two), paired_loss(two, one)
    assert (back.value, back.low, back.high) == pytest.approx((-forth.value, -forth.high, -forth.low))


def test_samples_on_which_all_agree_leave_room_for_a_loss():
    found = paired_loss([True] * 20, [True] * 20)
    assert found.value == 0.0
    assert found.low < 0.0 < found.high < 0.25


def test_pairs_that_go_together_say_more_than_the_same_shares_apart():
    together, apart = paired_loss(*pairs(25, 2, 0, 23)), paired_loss(*pairs(14, 13, 11, 12))
    assert together.value == apart.value
    assert together.high - together.low < apart.high - apart.low


def test_a_bootstrap_repeats_with_its_seed_and_nears_the_normal_interval():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    found = bootstrap_mean(values, seed=7)
    assert found == bootstrap_mean(values, seed=7)
    error = values.std() / 20
    assert found.value == values.mean()
    assert (found.low, found.high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.05)


@pytest.mark.parametrize("estimate", [lambda: wilson(0, 0), lambda: bootstrap_mean([], 0), lambda: paired_loss([], [])])
def test_nothing_has_no_interval(estimate):
    with pytest.raises(ValueError, match="no "):
        estimate()
