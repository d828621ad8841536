"""What a policy costs over all adapters together. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from forkkv_cluster.bench.quality.comparison import Row
from forkkv_cluster.bench.quality.policies import Policy
from forkkv_cluster.bench.quality.stats import Interval, Pairs, paired_loss

__all__ = ["Summary", "summaries", "whole"]


@dataclass(frozen=True, slots=True)
class Summary:
    """One policy over all adapters of a kind, each over all its lengths.

    is_converted   against ``isolated`` of the adapter that each was made from, instead of its own
    loss           of all samples of all adapters together (Newcombe, 95 %)
    worst          the adapter that loses most, and ``worst_loss`` what it loses
    num_level      adapters whose own interval has zero in it, or lies below
    num_shared     adapters that share something of the context; under ``auto`` not those that it serves ``isolated``
    shared_share   mean share of a context's tokens that a branch finds in the cache, and does not run for itself
    """

    policy: str
    is_converted: bool
    num_adapters: int
    num_samples: int
    loss: Interval
    worst: str
    worst_loss: Interval
    num_level: int
    num_shared: int
    shared_share: float

    def to_json(self) -> dict[str, Any]:
        """Intervals as {"value", "low", "high"}."""
        values = asdict(self)
        return {key: value._asdict() if isinstance(value, Interval) else value for key, value in values.items()}


def whole(rows: Sequence[Row]) -> list[Row]:
    """Each cell's row over all its lengths: of every adapter those that are listed first."""
    first = {row.adapter: row.context_tokens for row in reversed(rows)}
    return [row for row in rows if row.context_tokens == first[row.adapter]]


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Of each policy, canonically written, where nobody came before: adapters by themselves, then converted ones."""
    plain = [row for row in whole(rows) if row.is_first and row.writer == "canonical" and not row.is_reference]
    groups: dict[tuple[bool, str], list[Row]] = {}
    for is_converted in (False, True):
        for policy in Policy:
            found = [row for row in plain if row.policy == policy and (row.reference != row.adapter) is is_converted]
            if found:
                groups[is_converted, str(policy)] = found
    return [_summary(policy, is_converted, found) for (is_converted, policy), found in groups.items()]


def _summary(policy: str, is_converted: bool, rows: Sequence[Row]) -> Summary:
    worst = max(rows, key=lambda row: row.accuracy_loss.value)
    return Summary(
        policy=policy,
        is_converted=is_converted,
        num_adapters=len(rows),
        num_samples=sum(row.num_samples for row in rows),
        loss=paired_loss(reduce(Pairs.plus, (row.pairs for row in rows))),
        worst=worst.adapter,
        worst_loss=worst.accuracy_loss,
        num_level=sum(row.accuracy_loss.low <= 0 for row in rows),
        num_shared=sum((row.served or row.policy) != Policy.ISOLATED for row in rows),
        shared_share=statistics.fmean(row.shared_share for row in rows),
    )
