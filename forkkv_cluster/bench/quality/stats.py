"""Intervals of 95 % for shares, means and paired losses. Pure.

Samples are taken as independent. Positions of one text are not quite: intervals over positions are somewhat too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "Pairs", "bootstrap_mean", "paired_loss", "wilson"]

_Z = 1.959963984540054
"""Quantile of the normal distribution at 0.975."""
_NUM_RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float


def wilson(num_hits: int, num_trials: int) -> Interval:
    """Of a share. Raises ValueError without a trial."""
    if num_trials == 0:
        raise ValueError("a share of no trials")
    share, z2 = num_hits / num_trials, _Z * _Z
    centre = share + z2 / (2 * num_trials)
    spread = _Z * math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    scale = 1 + z2 / num_trials
    low = (centre - spread) / scale if num_hits else 0.0
    high = (centre + spread) / scale if num_hits < num_trials else 1.0
    return Interval(share, low, high)


class Pairs(NamedTuple):
    """The same samples answered twice: how often both were right, only the reference (lost), only the other (gained), none."""

    both: int = 0
    lost: int = 0
    gained: int = 0
    neither: int = 0

    @classmethod
    def of(cls, reference: Sequence[bool], other: Sequence[bool]) -> Pairs:
        pairs = [(bool(one), bool(two)) for one, two in zip(reference, other, strict=True)]
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    def plus(self, other: Pairs) -> Pairs:
        return Pairs(*(one + two for one, two in zip(self, other, strict=True)))


def paired_loss(pairs: Pairs) -> Interval:
    """Share right of the reference less that of the other: Newcombe's interval of 1998 (his method 10).

    It is made of the two Wilson intervals and how the pairs go together, so that it does not shrink to nothing where both are
    right on all of few samples, as a bootstrap would. Raises ValueError without a sample.
    """
    one, two = (wilson(pairs.both + right, sum(pairs)) for right in (pairs.lost, pairs.gained))
    phi = _phi(*pairs)
    loss = one.value - two.value
    low = math.sqrt(_square_of_difference(one.value - one.low, two.high - two.value, phi))
    high = math.sqrt(_square_of_difference(one.high - one.value, two.value - two.low, phi))
    return Interval(loss, loss - low, loss + high)


def _phi(both: int, only_one: int, only_two: int, neither: int) -> float:
    """Correlation of the pairs, with Newcombe's correction where it is positive; 0 where one side is constant."""
    margins = (both + only_one) * (only_two + neither) * (both + only_two) * (only_one + neither)
    if margins == 0:
        return 0.0
    product: float = both * neither - only_one * only_two
    if product > 0:
        product = max(product - (both + only_one + only_two + neither) / 2, 0)
    return product / math.sqrt(margins)


def _square_of_difference(a: float, b: float, phi: float) -> float:
    return max(0.0, a * a - 2 * phi * a * b + b * b)


def bootstrap_mean(values: Sequence[float] | npt.NDArray[np.float64], seed: int) -> Interval:
    """Of a mean, by 2,000 resamples from ``seed``. Of paired values, give their differences. Raises ValueError for none."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise ValueError("a mean of no values")
    rng = np.random.default_rng(seed)
    means = array[rng.integers(len(array), size=(_NUM_RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(array.mean()), float(low), float(high))
