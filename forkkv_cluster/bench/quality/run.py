"""All cells over all samples, in an order that lets each be compared with ``isolated`` as it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from forkkv_cluster.bench.quality.comparison import Outcome, Row, compared, first_divergence, rows_of
from forkkv_cluster.bench.quality.engine import Job, QualityEngine
from forkkv_cluster.bench.quality.policies import Cell, Policy, plan_cells
from forkkv_cluster.bench.quality.recorder import Reading, relative_errors
from forkkv_cluster.bench.quality.samples import QualitySample, length_of
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import PromptLogprobs, WriterMode
from forkkv_cluster.training.casebook.scoring import f1, score

__all__ = ["QualityOptions", "run_quality"]


@dataclass(frozen=True, slots=True)
class QualityOptions:
    """``batch_size`` samples run at once. ``num_probes``: of so many of an adapter's, evenly spaced, K, V and hidden states are
    read."""

    policies: tuple[Policy, ...] = tuple(Policy)
    writers: tuple[WriterMode, ...] = tuple(WriterMode)
    num_arrivals: int = 2
    max_tokens: int = 64
    num_top: int = 20
    num_probes: int = 2
    batch_size: int = 16
    seed: int = 0


@dataclass(slots=True)
class _Found:
    """What one cell brought, sample by sample."""

    outcomes: list[Outcome]
    scores: list[PromptLogprobs]
    readings: list[Reading]


def run_quality(
    engine: QualityEngine,
    samples: Sequence[QualitySample],
    options: QualityOptions,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """Rows in the order of the plan. ``on_progress`` is told what has run, and how many samples of how many in all cells.

    Raises InvalidArgument for an adapter without a sample, and what the engine raises for a request.
    """
    subjects = {subject.name: subject for subject in engine.subjects}
    cells = plan_cells(list(subjects.values()), options.policies, options.writers, options.num_arrivals)
    by_adapter = {name: [s for s in samples if s.adapter in ("", name)] for name in subjects}
    for name, own in by_adapter.items():
        if not own:
            raise InvalidArgument("--samples", name, "is an adapter without a sample", "Add samples for it, or leave it out.")
    total, done = sum(len(by_adapter[cell.adapter]) for cell in cells), 0
    rows: list[Row] = []
    reference, alone = _Found([], [], []), _Found([], [], [])
    for cell in cells:
        run = _Runner(engine, cell, options, None if cell.is_reference else reference)
        for count in run.all(by_adapter[cell.adapter]):
            done += count
            on_progress(f"{cell.adapter}, {cell.policy}, {cell.writer}", done, total)
        if cell.is_reference:
            reference = run.found
        if cell.first == cell.adapter:
            alone = run.found
        others = alone.outcomes if alone is not run.found else None
        errors = relative_errors(reference.readings, run.found.readings) if options.num_probes else None
        subject = subjects[cell.adapter]
        rows += rows_of(cell, subject, run.found.outcomes, reference.outcomes, others, errors, options.seed)
    return rows


def evenly_spaced(num_samples: int, count: int) -> list[int]:
    """``count`` different indices below ``num_samples``, or all there are: of samples that are sorted by length, of each."""
    count = min(count, num_samples)
    return [index * num_samples // count for index in range(count)]


class _Runner:
    """One cell. ``reference`` None: it is ``isolated`` itself, whose answers are the ones to be scored everywhere."""

    def __init__(self, engine: QualityEngine, cell: Cell, options: QualityOptions, reference: _Found | None) -> None:
        self._engine, self._cell, self._options, self._reference = engine, cell, options, reference
        self.found = _Found([], [], [])
        self._probes: list[int] = []

    def all(self, samples: Sequence[QualitySample]) -> Iterator[int]:
        """Runs them batch by batch; yields how many each batch had."""
        size = self._options.batch_size
        self._probes = evenly_spaced(len(samples), self._options.num_probes)
        for start in range(0, len(samples), size):
            self._batch(samples[start : start + size], start)
            yield len(samples[start : start + size])

    def _batch(self, samples: Sequence[QualitySample], start: int) -> None:
        options = self._options
        jobs = [self._engine.job(sample.context, sample.question) for sample in samples]
        run = self._engine.open(self._cell, jobs)
        answers = run.answers(options.max_tokens)
        if self._reference is None:
            wanted, references = answers, run.scores(answers, options.num_top)
            self.found.scores += references
            scores = run.scores(wanted, options.num_top, alone=True)
        else:
            rows = slice(start, start + len(samples))
            wanted = [outcome.token_ids for outcome in self._reference.outcomes[rows]]
            references = self._reference.scores[rows]
            scores = run.scores(wanted, options.num_top)
        for row in zip(samples, jobs, answers, wanted, references, scores, strict=True):
            self.found.outcomes.append(self._outcome(*row))
        probes = [index - start for index in self._probes if start <= index < start + len(samples)]
        self.found.readings += run.readings(wanted, probes)

    def _outcome(
        self,
        sample: QualitySample,
        job: Job,
        answer: tuple[int, ...],
        wanted: tuple[int, ...],
        reference: PromptLogprobs,
        scores: PromptLogprobs,
    ) -> Outcome:
        text = self._engine.text(answer).strip()
        return Outcome(
            context_tokens=length_of(sample, len(job.context)),
            is_right=bool(score(sample.role, text, sample.answer)),
            f1=f1(text, sample.answer),
            token_ids=answer,
            agreement=compared(reference, scores),
            divergence=first_divergence(wanted, answer),
        )
