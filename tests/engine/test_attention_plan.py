"""How a step's spans are split: shared pages once, residuals by sub-range, everything read exactly once per row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkkv_cluster.engine import attention_plan
from forkkv_cluster.engine.attention_plan import AttentionPlan, DecodeTile, Slots, locate, plan_attention
from forkkv_cluster.engine.batch import AttentionSpan, ResidualRead

P = 4


def pages(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int32)


def span(row: int, start: int, table: np.ndarray, residual: ResidualRead | None = None, num_rows: int = 1) -> AttentionSpan:
    return AttentionSpan(row, row + num_rows, start, table, residual)


def numbers(slots: Slots) -> list[int]:
    return list(range(slots.start, slots.stop)) if isinstance(slots, slice) else slots.tolist()


def read_by(plan: AttentionPlan, row: int) -> list[tuple[int, int, int | None]]:
    """(position, base slot, adapter slot of the residual) of every token that a decode row reads."""
    seen = []
    for tile in plan.tiles:
        for index in np.flatnonzero(plan.decode_rows[tile.rows] == row):
            adapters = [r.adapter_slot for r in tile.residuals if r.row_start <= index < r.row_end]
            hidden = tile.hidden[index] if tile.hidden is not None else np.zeros(tile.end - tile.start, dtype=bool)
            for offset, slot in enumerate(numbers(tile.slots)):
                if not hidden[offset]:
                    seen.append((tile.start + offset, slot, adapters[0] if adapters else None))
    for padded in plan.padded:
        for index in np.flatnonzero(plan.decode_rows[padded.rows] == row):
            slots = padded.slots[index, : padded.lengths[index]]
            seen += [(padded.tiles[index].start + offset, int(slot), None) for offset, slot in enumerate(slots)]
    return sorted(seen)


def all_tiles(plan: AttentionPlan) -> list[DecodeTile]:
    """Tiles read alone, then those read in padded batches, by row."""
    padded = [tile for batch in plan.padded for tile in batch.tiles]
    return [*plan.tiles, *sorted(padded, key=lambda tile: int(tile.rows[0]))]


def test_consecutive_pages_are_read_as_a_view() -> None:
    assert locate(pages(3, 4, 5), 1, 11, P) == slice(13, 23)


def test_scattered_pages_are_read_by_slot() -> None:
    assert numbers(locate(pages(7, 2, 5), 3, 9, P)) == [31, 8, 9, 10, 11, 20]


def test_spans_with_many_rows_are_attended_one_by_one() -> None:
    plan = plan_attention([span(0, 8, pages(0, 1, 2, 3, 4, 5, 6), num_rows=20), span(20, 5, pages(0, 1))], P)
    assert [(s.row_start, s.row_end, s.kv_len) for s in plan.extend] == [(0, 20, 28)]
    assert plan.decode_rows.tolist() == [20]


def test_shared_pages_are_read_once_for_agents_of_different_adapters() -> None:
    context = [4, 5, 6]
    spans = [
        span(i, 13, pages(*context, 20 + i), ResidualRead(i, pages(*(10 * (i + 1) + p for p in range(3))), 12))
        for i in range(3)
    ]
    plan = plan_attention(spans, P)
    shared, *own = all_tiles(plan)
    assert (shared.start, shared.end, shared.slots) == (0, 12, slice(16, 28))
    assert sorted(shared.rows.tolist()) == [0, 1, 2]
    assert [(r.row_start, r.row_end, r.adapter_slot) for r in shared.residuals] == [(0, 1, 0), (1, 2, 1), (2, 3, 2)]
    assert [(t.start, t.end, t.residuals) for t in own] == [(12, 14, ())] * 3


def test_agents_of_one_adapter_share_its_residual() -> None:
    residual = ResidualRead(3, pages(8, 9), 8)
    plan = plan_attention([span(0, 9, pages(0, 1, 2), residual), span(1, 9, pages(0, 1, 3), residual)], P)
    (only,) = all_tiles(plan)[0].residuals
    assert (only.row_start, only.row_end) == (0, 2)


def test_nested_prefixes_form_a_trie() -> None:
    spans = [span(0, 16, pages(1, 2, 3, 4, 5)), span(1, 16, pages(1, 2, 3, 6, 7)), span(2, 16, pages(1, 8, 9, 10, 11))]
    groups = [(t.start, t.end, sorted(t.rows.tolist())) for t in all_tiles(plan_attention(spans, P))]
    assert groups == [(0, 4, [0, 1, 2]), (4, 12, [0, 1]), (12, 17, [0]), (12, 17, [1]), (4, 17, [2])]


def test_a_residual_that_ends_inside_a_shared_run_cuts_it() -> None:
    short, long = ResidualRead(0, pages(0), 4), ResidualRead(1, pages(1, 2), 8)
    plan = plan_attention([span(0, 9, pages(0, 1, 2), short), span(1, 9, pages(0, 1, 3), long)], P)
    assert [(t.start, t.end, [r.adapter_slot for r in t.residuals]) for t in all_tiles(plan)[:2]] == [
        (0, 4, [0, 1]),
        (4, 8, [1]),
    ]


def test_an_empty_residual_read_is_none() -> None:
    plan = plan_attention([span(0, 3, pages(0), ResidualRead(0, pages(), 0))], P)
    assert all_tiles(plan)[0].residuals == ()


def test_a_page_that_a_row_writes_is_not_shared() -> None:
    """Two spans of one page table where the second starts inside the last page: that page needs a mask of its own."""
    plan = plan_attention([span(0, 8, pages(0, 1, 2)), span(1, 6, pages(0, 1))], P)
    assert [(t.start, t.end, len(t.rows)) for t in all_tiles(plan)] == [(0, 4, 2), (4, 9, 1), (4, 7, 1)]


def test_long_runs_are_cut_into_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "TILE_TOKENS", 8)
    plan = plan_attention([span(0, 18, pages(0, 1, 2, 3, 4))], P)
    assert [(t.start, t.end) for t in all_tiles(plan)] == [(0, 8), (8, 16), (16, 19)]


def test_no_spans_make_an_empty_plan() -> None:
    plan = plan_attention([], P)
    assert (plan.extend, plan.decode_rows.tolist(), plan.tiles) == ((), [], ())


@st.composite
def steps(draw: st.DrawFn) -> list[AttentionSpan]:
    """Sequences whose page tables are paths in a random trie: what a cache with forks hands out."""
    spans: list[AttentionSpan] = []
    paths: list[list[int]] = [[]]
    next_page, row = 0, 0
    for _ in range(draw(st.integers(1, 6))):
        path = list(draw(st.sampled_from(paths)))
        path = path[: draw(st.integers(0, len(path)))]
        shared_len = len(path) * P
        for _ in range(draw(st.integers(1, 3))):
            path.append(next_page)
            next_page += 1
        num_rows = draw(st.integers(1, 5))
        start = draw(st.integers(shared_len, len(path) * P - 1))
        start = max(shared_len, min(start, len(path) * P - num_rows))
        num_rows = min(num_rows, len(path) * P - start)
        used = -(-(start + num_rows) // P)
        residual = None
        if draw(st.booleans()):
            num_tokens = draw(st.integers(0, start + num_rows))
            residual = ResidualRead(draw(st.integers(0, 2)), pages(*range(-(-num_tokens // P))), num_tokens)
        spans.append(span(row, start, pages(*path[:used]), residual, num_rows))
        paths.append(path[: start // P])
        row += num_rows
    return spans


@given(steps())
def test_every_row_reads_each_of_its_tokens_once_with_the_right_residual(spans: list[AttentionSpan]) -> None:
    plan = plan_attention(spans, P)
    for s in spans:
        for row in range(s.row_start, s.row_end):
            position = s.start_pos + row - s.row_start
            base = numbers(locate(s.pages, 0, position + 1, P))
            covered = s.residual.num_tokens if s.residual is not None else 0
            wanted = [
                (i, slot, s.residual.adapter_slot if s.residual is not None and i < covered else None)
                for i, slot in enumerate(base)
            ]
            assert read_by(plan, row) == wanted


@given(steps())
def test_padding_repeats_a_slot_of_the_row_itself(spans: list[AttentionSpan]) -> None:
    for padded in plan_attention(spans, P).padded:
        for tile, slots, length in zip(padded.tiles, padded.slots, padded.lengths, strict=True):
            assert set(slots.tolist()) == set(numbers(tile.slots))
            assert length == tile.end - tile.start


@given(steps())
def test_no_tile_is_empty(spans: list[AttentionSpan]) -> None:
    def is_sound(tile: DecodeTile) -> bool:
        return tile.start < tile.end and len(tile.rows) > 0 and len(numbers(tile.slots)) == tile.end - tile.start

    assert all(is_sound(tile) for tile in all_tiles(plan_attention(spans, P)))
