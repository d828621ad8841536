"""The unit of work: a few samples through all cells of one adapter. What comes back is plain, and can cross processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forkkv_cluster.bench.quality.comparison import Outcome, compared, first_divergence
from forkkv_cluster.bench.quality.engine import Answer, CellRun, Job, QualityEngine
from forkkv_cluster.bench.quality.policies import Cell
from forkkv_cluster.bench.quality.recorder import Changes, Reading, changes
from forkkv_cluster.bench.quality.samples import QualitySample, length_of
from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.request import PromptLogprobs
from forkkv_cluster.core.request_builder import Modes
from forkkv_cluster.training.casebook.scoring import f1, score

__all__ = ["Batch", "CellResult", "run_batch"]


@dataclass(frozen=True, slots=True)
class Batch:
    """``cells`` of one subject, its reference first. No other batch finds its pages, which stand under ``name``: what is found
    does not depend on what ran before. ``probes``: indices of samples whose K, V and hidden states are read.
    ``modes``: how ``auto`` is served."""

    name: str
    cells: tuple[Cell, ...]
    samples: tuple[QualitySample, ...]
    probes: tuple[int, ...]
    modes: Modes
    max_tokens: int
    num_top: int


@dataclass(frozen=True, slots=True)
class CellResult:
    """Of one cell: an outcome for each sample, and how far each probe is from the reference."""

    outcomes: tuple[Outcome, ...]
    changes: tuple[Changes, ...]


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the others of the batch are held against."""

    answers: Sequence[Answer]
    scores: Sequence[PromptLogprobs]
    readings: Sequence[Reading]

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        return [answer.token_ids for answer in self.answers]


def run_batch(engine: QualityEngine, batch: Batch) -> list[CellResult]:
    """One result for each cell. Raises what the engine raises for a request."""
    jobs = [engine.job(sample.context, sample.question) for sample in batch.samples]
    runs = (engine.open(cell, jobs, batch.modes, batch.name) for cell in batch.cells)
    first = next(runs)
    answers = first.answers(batch.max_tokens)
    wanted = [answer.token_ids for answer in answers]
    reference = _Reference(answers, first.scores(wanted, batch.num_top), first.readings(wanted, batch.probes))
    again = first.scores(wanted, batch.num_top, alone=True)
    results = [_result(engine, batch, jobs, reference, answers, again, reference.readings)]
    return results + [_compared(engine, batch, jobs, reference, run) for run in runs]


def _compared(engine: QualityEngine, batch: Batch, jobs: Sequence[Job], reference: _Reference, run: CellRun) -> CellResult:
    answers = run.answers(batch.max_tokens)
    scores = run.scores(reference.token_ids, batch.num_top)
    return _result(engine, batch, jobs, reference, answers, scores, run.readings(reference.token_ids, batch.probes))


def _result(
    engine: QualityEngine,
    batch: Batch,
    jobs: Sequence[Job],
    reference: _Reference,
    answers: Sequence[Answer],
    scores: Sequence[PromptLogprobs],
    readings: Sequence[Reading],
) -> CellResult:
    texts = [engine.text(answer.token_ids).strip() for answer in answers]
    agreements = map(compared, reference.scores, scores)
    columns = zip(batch.samples, jobs, answers, texts, reference.token_ids, agreements, strict=True)
    outcomes = tuple(_outcome(*row) for row in columns)
    return CellResult(outcomes, tuple(changes(one, two) for one, two in zip(reference.readings, readings, strict=True)))


def _outcome(
    sample: QualitySample, job: Job, answer: Answer, text: str, wanted: tuple[int, ...], agreement: Agreement
) -> Outcome:
    return Outcome(
        context_tokens=length_of(sample, len(job.context)),
        is_right=bool(score(sample.role, text, sample.answer)),
        f1=f1(text, sample.answer),
        token_ids=answer.token_ids,
        agreement=agreement,
        divergence=first_divergence(wanted, answer.token_ids),
        shared_share=answer.num_shared / len(job.context),
    )
