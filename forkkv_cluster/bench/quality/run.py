"""All cells over all samples: planned, run batch by batch, and put together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from forkkv_cluster.bench.quality.batch import Batch, CellResult, run_batch
from forkkv_cluster.bench.quality.comparison import Row, rows_of
from forkkv_cluster.bench.quality.engine import QualityEngine
from forkkv_cluster.bench.quality.policies import Cell, Policy, Subject, plan_cells
from forkkv_cluster.bench.quality.pool import Pool
from forkkv_cluster.bench.quality.recorder import relative_errors
from forkkv_cluster.bench.quality.samples import QualitySample
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import WriterMode
from forkkv_cluster.core.verdict import SharingVerdict

__all__ = ["OnProgress", "QualityOptions", "QualityResult", "evenly_spaced", "run_quality"]

OnProgress = Callable[[str, int, int], None]
"""What runs, and how much of how much is done."""


@dataclass(frozen=True, slots=True)
class QualityOptions:
    """``batch_size`` samples run at once. ``num_probes``: of so many of an adapter's, evenly spaced, K, V and hidden states are
    read. ``references``: adapter -> the one whose ``isolated`` answers it is held against, where that is another."""

    policies: tuple[Policy, ...] = tuple(Policy)
    writers: tuple[WriterMode, ...] = tuple(WriterMode)
    num_arrivals: int = 2
    max_tokens: int = 64
    num_top: int = 20
    num_probes: int = 2
    batch_size: int = 16
    seed: int = 0
    references: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QualityResult:
    """Rows in the order of the plan; how ``auto`` is served, by adapter, where it was asked for."""

    rows: list[Row]
    verdicts: dict[str, SharingVerdict]


def run_quality(
    subjects: Sequence[Subject],
    pool: Pool,
    samples: Sequence[QualitySample],
    options: QualityOptions,
    on_progress: OnProgress = lambda what, done, total: None,
    max_seconds: float = math.inf,
) -> QualityResult:
    """``subjects``: what the pool's engines have loaded. ``on_progress`` is told how many samples of how many in all cells
    have run. After ``max_seconds`` no batch begins, and rows are of those that ran: of each adapter and length
    as large a share.

    Raises InvalidArgument for an adapter without a sample, and what the engine raises for a request.
    """
    subjects = [replace(subject, reference=options.references.get(subject.name, "")) for subject in subjects]
    by_adapter = {subject.name: [s for s in samples if s.adapter in ("", subject.name)] for subject in subjects}
    for name, own in by_adapter.items():
        if not own:
            raise InvalidArgument("--samples", name, "is an adapter without a sample", "Add samples for it, or leave it out.")
    deadline = time.monotonic() + max_seconds
    verdicts = _calibrated(subjects, pool, on_progress) if Policy.AUTO in options.policies else {}
    cells = plan_cells(subjects, options.policies, options.writers, options.num_arrivals)
    plan = _Plan(subjects, cells, by_adapter, options, verdicts)
    results = _all(pool, plan.batches, plan.order, on_progress, deadline)
    rows = [row for subject in subjects for row in plan.rows(subject, results)]
    return QualityResult(rows, verdicts)


def evenly_spaced(num_samples: int, count: int) -> list[int]:
    """``count`` different indices below ``num_samples``, or all there are: of samples that are sorted by length, of each."""
    count = min(count, num_samples)
    return [index * num_samples // count for index in range(count)]


def _calibrated(subjects: Sequence[Subject], pool: Pool, on_progress: OnProgress) -> dict[str, SharingVerdict]:
    names, found = [subject.name for subject in subjects], {}
    on_progress("calibrating", 0, len(names))
    for index, verdict in pool.run(QualityEngine.calibrate, names):
        found[names[index]] = verdict
        on_progress(f"calibrated {names[index]}", len(found), len(names))
    return {name: found[name] for name in names}


def _all(
    pool: Pool, batches: Sequence[Batch], order: Sequence[int], on_progress: OnProgress, deadline: float
) -> dict[int, list[CellResult]]:
    """By the batches' indices; those that had not begun by the deadline are missing."""
    sizes = [len(batch.cells) * len(batch.samples) for batch in batches]
    done, found = 0, {}
    for place, result in pool.run(run_batch, [batches[index] for index in order]):
        index = order[place]
        found[index] = result
        done += sizes[index]
        on_progress(batches[index].cells[-1].adapter, done, sum(sizes))
        if time.monotonic() > deadline:
            break
    return found


class _Plan:
    """Which batch has what."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        cells: Sequence[Cell],
        samples: Mapping[str, Sequence[QualitySample]],
        options: QualityOptions,
        verdicts: Mapping[str, SharingVerdict],
    ) -> None:
        self._options, self._verdicts = options, verdicts
        self._modes = {name: verdict.sharing for name, verdict in verdicts.items()}
        self.batches: list[Batch] = []
        self._places: dict[str, range] = {}
        for subject, own in zip(subjects, _by_subject(cells), strict=True):
            before = len(self.batches)
            self.batches += self._batches(own, samples[subject.name])
            self._places[subject.name] = range(before, len(self.batches))

    @property
    def order(self) -> list[int]:
        """All subjects and lengths of context side by side: wherever it ends, of each as large a share has run."""
        groups: dict[tuple[str, int], list[int]] = {}
        for name, places in self._places.items():
            for index in places:
                groups.setdefault((name, self.batches[index].samples[0].context_tokens), []).append(index)
        shares = {index: place / len(group) for group in groups.values() for place, index in enumerate(group)}
        return sorted(shares, key=lambda index: shares[index])

    def _batches(self, cells: Sequence[Cell], samples: Sequence[QualitySample]) -> Iterator[Batch]:
        options = self._options
        probes = evenly_spaced(len(samples), options.num_probes)
        for start in range(0, len(samples), options.batch_size):
            chosen = tuple(samples[start : start + options.batch_size])
            own_probes = tuple(index - start for index in probes if start <= index < start + len(chosen))
            name = f"{cells[-1].adapter}/{start}"
            yield Batch(name, tuple(cells), chosen, own_probes, self._modes, options.max_tokens, options.num_top)

    def rows(self, subject: Subject, results: Mapping[int, Sequence[CellResult]]) -> Iterator[Row]:
        """Of the subject's own cells: its reference, where that is another adapter, has rows of its own."""
        places = [place for place in self._places[subject.name] if place in results]
        if not places:
            return
        columns = [[results[place][number] for place in places] for number in range(len(self.batches[places[0]].cells))]
        outcomes = [[outcome for result in column for outcome in result.outcomes] for column in columns]
        alone = outcomes[0]
        for cell, column, own in zip(self.batches[places[0]].cells, columns, outcomes, strict=True):
            if cell.first == cell.adapter:
                alone = own
            if cell.adapter != subject.name:
                continue
            errors = relative_errors([change for result in column for change in result.changes])
            verdict = self._verdicts.get(subject.name) if cell.policy is Policy.AUTO else None
            others = alone if alone is not own else None
            yield from rows_of(cell, subject, own, outcomes[0], others, errors, verdict, self._options.seed)


def _by_subject(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of one subject after the other: each begins with its reference, and only there is one."""
    groups: list[list[Cell]] = []
    for cell in cells:
        if cell.is_reference:
            groups.append([])
        groups[-1].append(cell)
    return groups
