"""How far two ways to run the same tokens agree: counts over positions, their confidence bounds, and a KL. Pure.

Bounds are Wilson's score bounds for a share, each one-sided at 95 %. They take positions as independent; those of one text
are not quite, so many short texts say more than few long ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forkkv_cluster.core.request import PromptLogprobs

_Z = 1.6448536269514722
"""Quantile of the normal distribution at 0.95."""

_LEAST_REST = 1e-6
"""Probability outside the listed tokens, at least: below it, what one minus their sum says is rounding."""


def wilson_bounds(num_hits: int, num_trials: int) -> tuple[float, float]:
    """(lower, upper) bound of a share that ``num_hits`` of ``num_trials`` show, each one-sided at 95 %; (0, 1) of no trial."""
    if num_trials == 0:
        return 0.0, 1.0
    share, z2 = num_hits / num_trials, _Z * _Z
    centre = share + z2 / (2 * num_trials)
    spread = _Z * math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    scale = 1 + z2 / num_trials
    lower = (centre - spread) / scale if num_hits else 0.0
    upper = (centre + spread) / scale if num_hits < num_trials else 1.0
    return max(0.0, lower), min(1.0, upper)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of teacher-forced next-token distributions. A position disagrees where the two most likely tokens differ.

    kl_sum: of ``kl_of_top`` over all positions, nats.
    """

    num_positions: int = 0
    num_disagreements: int = 0
    kl_sum: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.num_positions + other.num_positions,
            self.num_disagreements + other.num_disagreements,
            self.kl_sum + other.kl_sum,
        )

    @property
    def disagreement(self) -> float:
        """Share of positions; 0 of none."""
        return self.num_disagreements / self.num_positions if self.num_positions else 0.0

    @property
    def lower_bound(self) -> float:
        return wilson_bounds(self.num_disagreements, self.num_positions)[0]

    @property
    def upper_bound(self) -> float:
        return wilson_bounds(self.num_disagreements, self.num_positions)[1]

    @property
    def mean_kl(self) -> float:
        """Nats a position; 0 of none."""
        return self.kl_sum / self.num_positions if self.num_positions else 0.0


@dataclass(frozen=True, slots=True)
class TextAgreement:
    """Over one text; ``first_divergence`` counts its compared positions from 0, None where all agree."""

    agreement: Agreement
    first_divergence: int | None


def compare(reference: PromptLogprobs, other: PromptLogprobs) -> TextAgreement:
    """The same tokens, scored twice, each with at least one alternative. Raises ValueError for different tokens."""
    if reference.first != other.first or not np.array_equal(reference.token_ids, other.token_ids):
        raise ValueError("two scores of different tokens")
    differs = reference.top_ids[:, 0] != other.top_ids[:, 0]
    agreement = Agreement(len(differs), int(differs.sum()), float(kl_of_top(reference, other).sum()))
    return TextAgreement(agreement, int(np.argmax(differs)) if agreement.num_disagreements else None)


def kl_of_top(reference: PromptLogprobs, other: PromptLogprobs) -> npt.NDArray[np.float64]:
    """KL(reference || other) of each position, [n] fp64, nats, over the tokens that stand among the most likely ones of both
    and all others taken together: never more than the KL of the whole distributions."""
    same = reference.top_ids[:, :, None] == other.top_ids[:, None, :]
    is_common = same.any(axis=2)
    log_p = reference.top_logprobs.astype(np.float64)
    log_q = np.take_along_axis(other.top_logprobs.astype(np.float64), same.argmax(axis=2), axis=1)
    p, q = (np.where(is_common, np.exp(logs), 0.0) for logs in (log_p, log_q))
    rest_p, rest_q = (np.maximum(1.0 - each.sum(axis=1), _LEAST_REST) for each in (p, q))
    listed = np.where(is_common, p * (log_p - log_q), 0.0).sum(axis=1)
    found: npt.NDArray[np.float64] = np.maximum(listed + rest_p * np.log(rest_p / rest_q), 0.0)
    return found
