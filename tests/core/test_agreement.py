"""Confidence bounds against the equation that defines them, and the KL against that of whole distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from forkkv_cluster.core.agreement import Agreement, compare, kl_of_top, wilson_bounds
from forkkv_cluster.core.request import PromptLogprobs

Z = 1.6448536269514722


def scores(logits: np.ndarray, num_top: int, first: int = 3) -> PromptLogprobs:
    """Of rows ``logits`` [n, V], as an engine would score them; the scored tokens count up."""
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logs, axis=1, kind="stable")[:, :num_top]
    n = len(logits)
    tokens = np.arange(n) % logits.shape[1]
    return PromptLogprobs(
        first,
        tokens.astype(np.int32),
        logs[np.arange(n), tokens].astype(np.float32),
        np.ones(n, dtype=np.int32),
        order.astype(np.int32),
        np.take_along_axis(logs, order, axis=1).astype(np.float32),
    )


def distance(share: float, seen: float, n: int) -> float:
    """How many standard deviations of a share ``share`` lie between it and what was seen."""
    return abs(seen - share) / math.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize(("hits", "trials"), [(1, 50), (4, 2000), (40, 2000), (1000, 2000), (1999, 2000)])
def test_a_bound_is_the_share_from_which_what_was_seen_is_just_as_far_as_95_percent_reach(hits: int, trials: int) -> None:
    lower, upper = wilson_bounds(hits, trials)
    assert lower < hits / trials < upper
    assert distance(lower, hits / trials, trials) == pytest.approx(Z, rel=1e-9)
    assert distance(upper, hits / trials, trials) == pytest.approx(Z, rel=1e-9)


@pytest.mark.parametrize(("hits", "trials", "bounds"), [(0, 0, (0.0, 1.0)), (0, 10, (0.0, 0.2129)), (10, 10, (0.7871, 1.0))])
def test_the_ends_are_closed(hits: int, trials: int, bounds: tuple[float, float]) -> None:
    assert wilson_bounds(hits, trials) == pytest.approx(bounds, abs=1e-4)


def test_two_thousand_positions_without_a_disagreement_say_less_than_two_tenths_of_a_percent() -> None:
    assert 0.001 < Agreement(2000, 0).upper_bound < 0.002
    assert Agreement(100, 0).upper_bound > 0.02


def test_agreements_add_up() -> None:
    total = Agreement(10, 1, 0.5) + Agreement(30, 3, 1.5)
    assert total == Agreement(40, 4, 2.0)
    assert (total.disagreement, total.mean_kl) == (0.1, 0.05)


def test_a_position_disagrees_where_the_most_likely_tokens_differ() -> None:
    reference = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    other = np.array([[3.0, 2.9, 0.0], [0.0, 1.0, 2.0], [9.0, 1.0, 2.0]])
    found = compare(scores(reference, 2), scores(other, 2))
    assert (found.agreement.num_positions, found.agreement.num_disagreements, found.first_divergence) == (3, 2, 1)
    assert compare(scores(reference, 2), scores(reference, 2)).first_divergence is None


def test_scores_of_different_tokens_are_not_compared() -> None:
    logits = np.zeros((2, 3))
    with pytest.raises(ValueError, match="different tokens"):
        compare(scores(logits, 1), scores(logits, 1, first=4))


def whole_kl(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (reference, other))
    return (p * np.log(p / q)).sum(axis=1)


def test_over_the_whole_vocabulary_the_kl_is_exact() -> None:
    reference, other = np.random.default_rng(0).normal(size=(2, 50, 16))
    found = kl_of_top(scores(reference, 16), scores(other, 16))
    assert found == pytest.approx(whole_kl(reference, other), abs=1e-4)


@pytest.mark.parametrize("num_top", [1, 5, 20])
def test_over_the_most_likely_tokens_it_is_never_more_and_mostly_there(num_top: int) -> None:
    rng = np.random.default_rng(num_top)
    reference = 4 * rng.normal(size=(200, 500))
    other = reference + 0.3 * rng.normal(size=reference.shape)
    found, whole = kl_of_top(scores(reference, num_top), scores(other, num_top)), whole_kl(reference, other)
    assert (found >= 0).all()
    assert (found <= whole + 1e-5).all()
    if num_top == 20:
        assert found.mean() > 0.7 * whole.mean()
