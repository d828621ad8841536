"""What one cell's outcomes say beside those of ``isolated`` on the same samples. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from forkkv_cluster.bench.quality.policies import Cell, Policy, Subject
from forkkv_cluster.bench.quality.stats import Interval, Pairs, bootstrap_mean, paired_loss, wilson
from forkkv_cluster.core.agreement import Agreement, kl_of_top
from forkkv_cluster.core.request import PromptLogprobs
from forkkv_cluster.core.verdict import SharingVerdict

__all__ = ["Outcome", "Row", "compared", "first_divergence", "row_of", "rows_of"]

ALL_LENGTHS = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One sample in one cell. ``divergence``: index of the first generated token that ``isolated`` does not have, None where
    all are the same. ``agreement`` is teacher-forced, over the tokens that ``isolated`` generated. ``shared_share``: of the
    context's tokens, those that the branch found in the cache instead of running them."""

    context_tokens: int
    is_right: bool
    f1: float
    token_ids: tuple[int, ...]
    agreement: Agreement
    divergence: int | None
    shared_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One cell at one length of context (0: at all). Intervals are of 95 %. "isolated" is that of ``reference``.

    served                  how ``auto`` was served; of any other policy empty
    accuracy, f1            share of right answers (Wilson); mean F1 over words (bootstrap)
    pairs                   how the right answers of isolated and of this go together
    accuracy_loss, f1_loss  of isolated less this, on the same samples: above 0 is worse (Newcombe; bootstrap of differences)
    agreement               share of teacher-forced positions with isolated's most likely token (Wilson)
    kl                      mean KL(isolated | this), nats a position, over the tokens among the most likely of both, that of
                            isolated's answer, and all others taken together: never more than the whole KL
    identical               share of free-running answers that are isolated's, token for token (Wilson)
    divergence              median index of the first other token, over the answers that differ; None without such
    shared_share            mean share of the context's tokens that the branch found in the cache, and did not run for itself
    same_as_alone           share of answers that are those of the same cell without anybody before; None where nobody was
    errors                  "k", "v", "hidden" -> relative error against isolated by layer; empty where it was not read
    """

    adapter: str
    lora_rank: int
    policy: str
    writer: str
    first: str
    reference: str
    served: str
    context_tokens: int
    num_samples: int
    num_positions: int
    accuracy: Interval
    pairs: Pairs
    accuracy_loss: Interval
    f1: Interval
    f1_loss: Interval
    agreement: Interval
    kl: float
    identical: Interval
    divergence: float | None
    shared_share: float
    same_as_alone: float | None = None
    errors: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Whether the adapter itself came first."""
        return self.first == self.adapter

    @property
    def is_reference(self) -> bool:
        """Whether this is what the others are held against."""
        return self.policy == Policy.ISOLATED and self.reference == self.adapter

    def to_json(self) -> dict[str, Any]:
        """Intervals as {"value", "low", "high"}, pairs by name too."""
        values = asdict(self)
        return {key: value._asdict() if isinstance(value, Interval | Pairs) else value for key, value in values.items()}


def first_divergence(reference: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, an end counting as a token; None where they are the same."""
    if tuple(reference) == tuple(other):
        return None
    pairs = zip(reference, other, strict=False)
    return next((index for index, (one, two) in enumerate(pairs) if one != two), min(len(reference), len(other)))


def compared(reference: PromptLogprobs, other: PromptLogprobs) -> Agreement:
    """Over the same tokens, scored twice. Raises ValueError for different ones."""
    if not np.array_equal(reference.token_ids, other.token_ids):
        raise ValueError("two scores of different tokens")
    num_others = int((reference.top_ids[:, 0] != other.top_ids[:, 0]).sum())
    kl = kl_of_top(_with_forced(reference, -1), _with_forced(other, -2))
    return Agreement(len(reference.token_ids), num_others, float(kl.sum()))


def _with_forced(scores: PromptLogprobs, nobody: int) -> PromptLogprobs:
    """The forced token listed at each position, too: where its most likely ones lack it, one list could miss all of the other.
    Where they have it, ``nobody`` is listed instead, an id that no token and no other list has."""
    is_listed = (scores.top_ids == scores.token_ids[:, None]).any(axis=1)
    ids = np.where(is_listed, nobody, scores.token_ids).astype(np.int32)
    return replace(
        scores,
        top_ids=np.column_stack([scores.top_ids, ids]),
        top_logprobs=np.column_stack([scores.top_logprobs, scores.logprobs]),
    )


def rows_of(
    cell: Cell,
    subject: Subject,
    outcomes: Sequence[Outcome],
    references: Sequence[Outcome],
    alone: Sequence[Outcome] | None = None,
    errors: Mapping[str, list[float]] | None = None,
    verdict: SharingVerdict | None = None,
    seed: int = 0,
) -> list[Row]:
    """One row for each length, shortest first, after one over all of them, which has the errors; of one length, that alone.

    ``references`` and ``alone`` (the cell in which nobody came before, None where this is it) are of the same samples.
    ``verdict``: what served ``auto``.
    """
    served = str(verdict.sharing) if verdict is not None else ""
    lengths = sorted({outcome.context_tokens for outcome in outcomes})
    groups = [lengths[0]] if len(lengths) == 1 else [ALL_LENGTHS, *lengths]
    rows = []
    for length in groups:
        chosen = [index for index, outcome in enumerate(outcomes) if length in (ALL_LENGTHS, outcome.context_tokens)]
        own, wanted = ([column[index] for index in chosen] for column in (outcomes, references))
        before = [alone[index] for index in chosen] if alone is not None else None
        kept = errors if errors is not None and length == groups[0] else {}
        rows.append(row_of(cell, subject, length, own, wanted, before, kept, served, seed))
    return rows


def row_of(
    cell: Cell,
    subject: Subject,
    context_tokens: int,
    outcomes: Sequence[Outcome],
    references: Sequence[Outcome],
    alone: Sequence[Outcome] | None,
    errors: Mapping[str, list[float]],
    served: str,
    seed: int,
) -> Row:
    """Of samples of that length; all sequences are parallel, with at least one entry."""
    agreement = sum((outcome.agreement for outcome in outcomes), Agreement())
    pairs = Pairs.of([o.is_right for o in references], [o.is_right for o in outcomes])
    diverged = [outcome.divergence for outcome in outcomes if outcome.divergence is not None]
    return Row(
        adapter=cell.adapter,
        reference=cell.reference,
        served=served,
        lora_rank=subject.lora_rank,
        policy=str(cell.policy),
        writer=str(cell.writer),
        first=cell.first,
        context_tokens=context_tokens,
        num_samples=len(outcomes),
        num_positions=agreement.num_positions,
        accuracy=wilson(sum(outcome.is_right for outcome in outcomes), len(outcomes)),
        pairs=pairs,
        accuracy_loss=paired_loss(pairs),
        f1=bootstrap_mean([outcome.f1 for outcome in outcomes], seed),
        f1_loss=bootstrap_mean([one.f1 - two.f1 for one, two in zip(references, outcomes, strict=True)], seed),
        agreement=wilson(agreement.num_positions - agreement.num_disagreements, agreement.num_positions),
        kl=agreement.mean_kl,
        identical=wilson(len(outcomes) - len(diverged), len(outcomes)),
        divergence=statistics.median(diverged) if diverged else None,
        shared_share=statistics.fmean(outcome.shared_share for outcome in outcomes),
        same_as_alone=_share_of_same(outcomes, alone) if alone is not None else None,
        errors=errors,
    )


def _share_of_same(outcomes: Sequence[Outcome], others: Sequence[Outcome]) -> float:
    return sum(one.token_ids == two.token_ids for one, two in zip(outcomes, others, strict=True)) / len(outcomes)
