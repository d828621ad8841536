"""Which decode rows read the same base pages: runs of pages that are loaded once for all of them.

The page tables of a step's sequences form a trie. Walked from the root, every stretch that two or more share is a run; what a
sequence has beyond its last run is its own. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from forkkv_cluster.engine.batch import AttentionSpan, IntArray

MIN_RUN_TOKENS = 256
"""Shorter stretches are read with the tails: a run costs a program and one partial result a row more."""

MAX_DEPTH = 2
"""Runs that lie one behind the other on a path, at most; what is shared below is read by each."""


@dataclass(frozen=True, slots=True)
class Subgroup:
    """Members [first, end) of a run read the residual of ``adapter_slot`` in the pages of ``sequence``, over all of the run."""

    adapter_slot: int
    first: int
    end: int
    sequence: int


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Tokens [start, end) that ``members`` (numbers of sequences, those of an adapter side by side) share; ``depth`` runs lie
    before it on their path."""

    start: int
    end: int
    depth: int
    members: tuple[int, ...]
    subgroups: tuple[Subgroup, ...]


def find_shared_runs(spans: Sequence[AttentionSpan], page_size: int, max_members: int) -> tuple[list[SharedRun], IntArray]:
    """Of sequences with one row each: their runs, and for each sequence the first token behind its last run, [N] int64.

    ``max_members`` of a run: more that share a stretch are several runs over it; below two there are no runs.
    """
    own_starts = np.zeros(len(spans), dtype=np.int64)
    if max_members < 2:
        return [], own_starts
    walk = _Walk(spans, page_size, max_members)
    runs = list(walk.runs(list(range(len(spans))), 0, 0))
    for run in runs:
        own_starts[list(run.members)] = np.maximum(own_starts[list(run.members)], run.end)
    return runs, own_starts


@dataclass(frozen=True, slots=True)
class _Walk:
    spans: Sequence[AttentionSpan]
    page_size: int
    max_members: int

    def runs(self, members: Sequence[int], first_page: int, depth: int) -> Iterator[SharedRun]:
        """Runs from ``first_page`` on of sequences that share all pages before it."""
        if depth == MAX_DEPTH:
            return
        by_page: dict[int, list[int]] = {}
        for member in members:
            pages = self.spans[member].pages
            if first_page < len(pages):
                by_page.setdefault(int(pages[first_page]), []).append(member)
        for group in by_page.values():
            end = _shared_end(self.spans, group, first_page, self.page_size) if len(group) > 1 else first_page
            if (end - first_page) * self.page_size >= MIN_RUN_TOKENS:
                bounds = first_page * self.page_size, end * self.page_size
                # Agents of one adapter side by side; the sort is stable.
                ordered = sorted(group, key=lambda member: _adapter(self.spans[member]))
                for first in range(0, len(ordered), self.max_members):
                    yield _run(self.spans, ordered[first : first + self.max_members], *bounds, depth)
                yield from self.runs(group, end, depth + 1)


def _adapter(span: AttentionSpan) -> int:
    return span.residual.adapter_slot if span.residual is not None else -1


def _shared_end(spans: Sequence[AttentionSpan], group: Sequence[int], first_page: int, page_size: int) -> int:
    """Behind the last page that all share, that lies wholly before each one's row, and over which no residual ends."""
    limit = min(spans[member].start_pos for member in group) // page_size
    for member in group:
        residual = spans[member].residual
        if residual is not None and first_page < residual.num_tokens // page_size < limit:
            limit = residual.num_tokens // page_size
    lead = spans[group[0]].pages[first_page:limit]
    for member in group[1:]:
        differs = spans[member].pages[first_page : first_page + len(lead)] != lead
        if differs.any():
            lead = lead[: int(np.argmax(differs))]
    return first_page + len(lead)


def _run(spans: Sequence[AttentionSpan], group: Sequence[int], start: int, end: int, depth: int) -> SharedRun:
    by_residual: dict[tuple[int, bytes] | None, list[int]] = {}
    for member in group:
        residual = spans[member].residual
        key = None
        if residual is not None and residual.num_tokens > start:
            # The run ends with a residual at the latest, so that whoever has one in it has one everywhere.
            key = residual.adapter_slot, residual.pages.tobytes()
        by_residual.setdefault(key, []).append(member)
    members: list[int] = []
    subgroups = []
    for key, own in by_residual.items():
        if key is not None:
            subgroups.append(Subgroup(key[0], len(members), len(members) + len(own), own[0]))
        members += own
    return SharedRun(start, end, depth, tuple(members), tuple(subgroups))
