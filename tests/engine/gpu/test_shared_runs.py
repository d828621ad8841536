"""Runs of pages that decode rows share: each key is read by each row once, in a run or by itself."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from forkkv_cluster.engine.batch import AttentionSpan, ResidualRead
from forkkv_cluster.engine.gpu.shared_runs import MAX_DEPTH, MIN_RUN_TOKENS, find_shared_runs

PAGE = 64
LONG = -(-MIN_RUN_TOKENS // PAGE)


def span(row: int, pages: Sequence[int], kv_len: int, adapter: int | None = None, residual_pages: int = 0) -> AttentionSpan:
    read = None
    if adapter is not None:
        own = np.arange(1000 * adapter, 1000 * adapter + residual_pages, dtype=np.int32)
        read = ResidualRead(adapter, own, residual_pages * PAGE)
    return AttentionSpan(row, row + 1, kv_len - 1, np.array(pages, dtype=np.int32), read)


def test_a_context_that_two_read_is_one_run_and_the_rest_is_their_own():
    shared = list(range(10))
    spans = [span(0, [*shared, 50], 10 * PAGE + 3), span(1, [*shared, 60, 61], 11 * PAGE + 9)]
    (run,), starts = find_shared_runs(spans, PAGE, 32)
    assert (run.start, run.end, run.members, run.subgroups) == (0, 10 * PAGE, (0, 1), ())
    assert starts.tolist() == [10 * PAGE, 10 * PAGE]


def test_a_row_never_reads_a_page_that_it_stands_in_through_a_run():
    pages = list(range(8))
    _, starts = find_shared_runs([span(0, pages, 8 * PAGE), span(1, pages, 7 * PAGE + 1)], PAGE, 32)
    assert starts.tolist() == [7 * PAGE, 7 * PAGE]


def test_a_stretch_too_short_to_pay_is_left_to_each():
    pages = list(range(LONG - 1))
    runs, starts = find_shared_runs([span(n, [*pages, 90 + n], LONG * PAGE) for n in range(3)], PAGE, 32)
    assert runs == []
    assert starts.tolist() == [0, 0, 0]


def test_agents_of_one_adapter_stand_side_by_side_and_share_its_residual():
    pages = list(range(LONG))
    adapters = [1, 2, 1, None, 2]
    spans = [span(n, [*pages, 90 + n], (LONG + 1) * PAGE, a, LONG) for n, a in enumerate(adapters)]
    (run,), _ = find_shared_runs(spans, PAGE, 32)
    assert sorted(run.members) == [0, 1, 2, 3, 4]
    by_adapter = {s.adapter_slot: run.members[s.first : s.end] for s in run.subgroups}
    assert by_adapter == {1: (0, 2), 2: (1, 4)}
    assert all(adapters[s.sequence] == s.adapter_slot for s in run.subgroups)


def test_a_run_ends_where_a_residual_does_and_goes_on_without_it():
    pages = list(range(3 * LONG))
    spans = [span(n, [*pages, 90 + n], (3 * LONG + 1) * PAGE, 1, 2 * LONG) for n in range(2)]
    runs, starts = find_shared_runs(spans, PAGE, 32)
    assert [(run.start, run.end, len(run.subgroups)) for run in runs] == [
        (0, 2 * LONG * PAGE, 1),
        (2 * LONG * PAGE, 3 * LONG * PAGE, 0),
    ]
    assert starts.tolist() == [3 * LONG * PAGE] * 2


def test_what_is_shared_below_a_shared_context_is_a_run_behind_it():
    root, left, right = list(range(LONG)), list(range(100, 100 + LONG)), list(range(200, 200 + LONG))
    spans = [span(n, [*root, *side, 900 + n], (2 * LONG + 1) * PAGE) for n, side in enumerate((left, left, right, right))]
    runs, starts = find_shared_runs(spans, PAGE, 32)
    assert [(run.depth, run.members) for run in runs] == [(0, (0, 1, 2, 3)), (1, (0, 1)), (1, (2, 3))]
    assert starts.tolist() == [2 * LONG * PAGE] * 4


def test_more_members_than_a_run_may_have_are_several_runs_over_the_same_stretch():
    pages = list(range(LONG))
    spans = [span(n, [*pages, 90 + n], (LONG + 1) * PAGE) for n in range(5)]
    runs, starts = find_shared_runs(spans, PAGE, 2)
    assert [(run.start, run.end, run.depth, run.members) for run in runs] == [
        (0, LONG * PAGE, 0, members) for members in ((0, 1), (2, 3), (4,))
    ]
    assert starts.tolist() == [LONG * PAGE] * 5


@st.composite
def forests(draw: st.DrawFn) -> list[AttentionSpan]:
    """Sequences whose page tables agree up to random places."""
    spans, next_page = [], 0
    paths: list[list[int]] = []
    for row in range(draw(st.integers(1, 6))):
        lead = draw(st.sampled_from(paths)) if paths and draw(st.booleans()) else []
        pages = list(lead[: draw(st.integers(0, len(lead)))])
        new = draw(st.integers(1, 4 * LONG))
        pages += range(next_page, next_page + new)
        next_page += new
        kv_len = (len(pages) - 1) * PAGE + draw(st.integers(1, PAGE))
        adapter = draw(st.sampled_from([None, 1, 2]))
        spans.append(span(row, pages, kv_len, adapter, draw(st.integers(1, len(pages))) if adapter else 0))
        paths.append(pages)
    return spans


@given(forests(), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_every_key_is_read_once_by_each_row_under_its_own_residual(spans: list[AttentionSpan], max_members: int):
    runs, starts = find_shared_runs(spans, PAGE, max_members)
    assert all(len(run.members) <= max_members for run in runs)
    for number, own in enumerate(spans):
        mine = sorted((run for run in runs if number in run.members), key=lambda run: run.start)
        assert [run.start for run in mine] == [0, *[run.end for run in mine]][: len(mine)]
        assert [run.depth for run in mine] == list(range(len(mine)))
        assert len(mine) <= MAX_DEPTH
        assert starts[number] == (mine[-1].end if mine else 0) < own.kv_len
        for run in mine:
            first, end = run.start // PAGE, run.end // PAGE
            assert all((spans[m].pages[first:end] == own.pages[first:end]).all() for m in run.members)
            place = run.members.index(number)
            adapters = [s.adapter_slot for s in run.subgroups if s.first <= place < s.end]
            has_residual = own.residual is not None and own.residual.num_tokens > run.start
            assert adapters == ([own.residual.adapter_slot] if has_residual and own.residual else [])
            assert not has_residual or (own.residual is not None and own.residual.num_tokens >= run.end)
