"""Which keys are read together: a step's attention spans, split so that shared pages are read once.

Spans with many rows (prefill, extend) are attended one by one over K and V built for them. Spans with few rows (decode)
are walked as a trie over their page tables: the pages that several of them share become one *tile* that serves the rows
of all of them, whatever their adapters, and what is left becomes tiles of their own.

Pure numpy; the same plan serves every layer of the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from forkkv_cluster.cache.merged_keys import MergedUse
from forkkv_cluster.engine.batch import AttentionSpan, PageArray

Slots = slice | npt.NDArray[np.int64]
"""Where consecutive tokens lie in a pool: a slice when their pages are consecutive (read as a view), else slot numbers."""

EXTEND_MIN_ROWS = 16
"""Rows from which building K and V for one span beats stacking its rows with those of others."""

PADDED_MAX_TOKENS = 512
"""Longest private tile that is copied into a padded batch. One call for eight tails of 128 tokens takes 0.06 ms, eight
calls 0.6; beyond this the copy costs more than the calls."""

PADDED_MIN_TOKENS = 64
"""Tiles shorter than this count as this long when tiles of similar length are put together."""

MAX_CUTS = 2
CUT_MIN_TOKENS = 512
"""A tile is cut at borders between runs of consecutive pages when they are few and one of the runs is this long. Copying K and
V of 2,048 tokens takes 0.12 ms a layer; one more part is a few calls. Chosen by that, not swept."""

TILE_TOKENS = 4096
"""Longest tile, tokens: bounds the score matrix of a decode step."""


@dataclass(frozen=True, slots=True, eq=False)
class ResidualPiece:
    """Tokens [start, end) of a span carry the residual of ``adapter_slot``, at ``slots`` of its rank class's pool.

    ``key`` is equal for pieces that mean the same residual of the same base tokens: they can be built once.
    """

    adapter_slot: int
    start: int
    end: int
    slots: Slots
    key: tuple[int, int, bytes, bytes]
    merged_keys: MergedUse | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ExtendSpan:
    """One span with many rows. ``residual`` covers tokens [0, residual.end)."""

    row_start: int
    row_end: int
    start_pos: int
    slots: Slots
    residual: ResidualPiece | None

    @property
    def kv_len(self) -> int:
        return self.start_pos + self.row_end - self.row_start


@dataclass(frozen=True, slots=True, eq=False)
class TileResidual:
    """Tile rows [row_start, row_end) also read this adapter's residual, at ``slots``, for every token of the tile."""

    row_start: int
    row_end: int
    adapter_slot: int
    slots: Slots
    merged_keys: MergedUse | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DecodeTile:
    """Tokens [start, end) at ``slots`` of the base pool, read by ``rows`` [n] (numbers among the decode rows).

    hidden [n, end - start] bool says which keys a row may not see yet; None when it sees all.
    """

    rows: npt.NDArray[np.int64]
    start: int
    end: int
    slots: Slots
    residuals: tuple[TileResidual, ...]
    hidden: npt.NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True, eq=False)
class PaddedTiles:
    """Short private tiles of one row each, read in one call: the row of tiles[i] sees slots[i, : lengths[i]].

    rows [n], lengths [n] int64; slots [n, longest] int64, padded with the row's own last slot.
    """

    tiles: tuple[DecodeTile, ...]
    rows: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """extend: spans with many rows; decode_rows [N] int64: rows of all other spans; tiles and padded: what those read."""

    extend: tuple[ExtendSpan, ...]
    decode_rows: npt.NDArray[np.int64]
    tiles: tuple[DecodeTile, ...]
    padded: tuple[PaddedTiles, ...] = ()


def plan_attention(spans: Sequence[AttentionSpan], page_size: int, extend_min_rows: int = EXTEND_MIN_ROWS) -> AttentionPlan:
    """Split a step's spans. ``extend_min_rows`` is a parameter so that tests can force either way."""
    extend = tuple(_extend(span, page_size) for span in spans if span.num_rows >= extend_min_rows)
    decode = [_without_empty_residual(span) for span in spans if 0 < span.num_rows < extend_min_rows]
    row_starts = np.cumsum([0] + [span.num_rows for span in decode])
    decode_rows = np.concatenate(
        [np.arange(s.row_start, s.row_end, dtype=np.int64) for s in decode] or [np.zeros(0, dtype=np.int64)]
    )
    members = [_Member(span, int(first)) for span, first in zip(decode, row_starts, strict=False)]
    tiles = list(_Tiler(page_size).walk(members, 0))
    # One tile of a row at most: a call cannot merge two partial results into the same row.
    short = {int(tile.rows[0]): tile for tile in tiles if _is_short_and_private(tile)}
    if len(short) < 2:
        return AttentionPlan(extend, decode_rows, tuple(tiles))
    chosen = {id(tile) for tile in short.values()}
    others = tuple(tile for tile in tiles if id(tile) not in chosen)
    return AttentionPlan(extend, decode_rows, others, tuple(_pad(list(short.values()))))


def _is_short_and_private(tile: DecodeTile) -> bool:
    is_plain = not tile.residuals and tile.hidden is None
    return is_plain and len(tile.rows) == 1 and tile.end - tile.start <= PADDED_MAX_TOKENS


def _pad(tiles: Sequence[DecodeTile]) -> Iterator[PaddedTiles]:
    """Tiles of similar length together, so that padding at most doubles what is read."""
    by_length = sorted(tiles, key=lambda tile: tile.end - tile.start)
    first = 0
    for index in range(1, len(by_length) + 1):
        shortest = max(by_length[first].end - by_length[first].start, PADDED_MIN_TOKENS)
        if index == len(by_length) or by_length[index].end - by_length[index].start > 2 * shortest:
            yield _padded(by_length[first:index])
            first = index


def _padded(tiles: Sequence[DecodeTile]) -> PaddedTiles:
    lengths = np.array([tile.end - tile.start for tile in tiles], dtype=np.int64)
    slots = np.empty((len(tiles), int(lengths.max())), dtype=np.int64)
    for row, tile in zip(slots, tiles, strict=True):
        own = np.arange(tile.slots.start, tile.slots.stop) if isinstance(tile.slots, slice) else tile.slots
        row[: len(own)] = own
        row[len(own) :] = own[-1]
    return PaddedTiles(tuple(tiles), np.concatenate([tile.rows for tile in tiles]), slots, lengths)


def locate(pages: PageArray, start: int, end: int, page_size: int) -> Slots:
    """Slots of tokens [start, end) of a sequence with these pages."""
    used = pages[start // page_size : -(-end // page_size)].astype(np.int64)
    offset = start % page_size
    if len(used) and used[-1] - used[0] == len(used) - 1 and (np.diff(used) == 1).all():
        first = int(used[0]) * page_size + offset
        return slice(first, first + end - start)
    slots = (used[:, None] * page_size + np.arange(page_size)).reshape(-1)
    return slots[offset : offset + end - start]


def _without_empty_residual(span: AttentionSpan) -> AttentionSpan:
    if span.residual is not None and span.residual.num_tokens == 0:
        return replace(span, residual=None)
    return span


def _extend(span: AttentionSpan, page_size: int) -> ExtendSpan:
    piece = None
    if span.residual is not None and span.residual.num_tokens > 0:
        end = span.residual.num_tokens
        num_pages = -(-end // page_size)
        key = (span.residual.adapter_slot, end, span.pages[:num_pages].tobytes(), span.residual.pages.tobytes())
        slots = locate(span.residual.pages, 0, end, page_size)
        piece = ResidualPiece(span.residual.adapter_slot, 0, end, slots, key, span.residual.merged_keys)
    slots = locate(span.pages, 0, span.kv_len, page_size)
    return ExtendSpan(span.row_start, span.row_end, span.start_pos, slots, piece)


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    span: AttentionSpan
    first_row: int  # among the decode rows

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + self.span.num_rows)


class _Tiler:
    """Walks the trie that the page tables of decode spans form."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size

    def walk(self, members: Sequence[_Member], first_page: int) -> Iterator[DecodeTile]:
        """Tiles over pages [first_page, ...) of ``members``, which share all pages before."""
        by_page: dict[int, list[_Member]] = {}
        for member in members:
            by_page.setdefault(int(member.span.pages[first_page]), []).append(member)
        for group in by_page.values():
            start = first_page * self._page_size
            shared = self._shared_pages(group, first_page) if len(group) > 1 else first_page
            if shared > first_page:
                yield from self._cut(group, start, shared * self._page_size)
                yield from self.walk(group, shared)
            else:
                for member in group:
                    yield from self._cut([member], start, member.span.kv_len)

    def _shared_pages(self, group: Sequence[_Member], first_page: int) -> int:
        """Pages that all members share and that lie wholly before the first row of each, so that no row needs a mask."""
        limit = min(member.span.start_pos for member in group) // self._page_size
        lead = group[0].span.pages
        for member in group[1:]:
            differs = member.span.pages[first_page:limit] != lead[first_page:limit]
            limit = first_page + int(np.argmax(differs)) if differs.any() else limit
        return max(limit, first_page)

    def _cut(self, group: Sequence[_Member], start: int, end: int) -> Iterator[DecodeTile]:
        """Tiles over [start, end), cut where some member's residual ends and at the longest tile."""
        ends = {member.span.residual.num_tokens for member in group if member.span.residual is not None}
        borders = sorted({start, end, *(e for e in ends if start < e < end), *self._breaks(group[0].span.pages, start, end)})
        for low, high in itertools.pairwise(borders):
            for tile_start in range(low, high, TILE_TOKENS):
                yield self._tile(group, tile_start, min(tile_start + TILE_TOKENS, high))

    def _breaks(self, pages: PageArray, start: int, end: int) -> list[int]:
        """Tokens inside (start, end) where the run of consecutive pages ends, if cutting there spares copies: a tile is read
        through a view only when all its pages are consecutive."""
        first = start // self._page_size
        jumps = first + 1 + np.flatnonzero(np.diff(pages[first : -(-end // self._page_size)]) != 1)
        cuts = [int(page) * self._page_size for page in jumps]
        pieces = np.diff([start, *cuts, end])
        return cuts if len(cuts) <= MAX_CUTS and pieces.max() >= CUT_MIN_TOKENS else []

    def _tile(self, group: Sequence[_Member], start: int, end: int) -> DecodeTile:
        by_residual: dict[tuple[int, bytes, MergedUse | None] | None, list[_Member]] = {}
        for member in group:
            by_residual.setdefault(self._residual_key(member, start, end), []).append(member)
        rows: list[int] = []
        residuals: list[TileResidual] = []
        for key, members in by_residual.items():
            row_start = len(rows)
            rows.extend(row for member in members for row in member.rows)
            residual = members[0].span.residual
            if key is not None and residual is not None:
                slots = locate(residual.pages, start, end, self._page_size)
                residuals.append(TileResidual(row_start, len(rows), residual.adapter_slot, slots, residual.merged_keys))
        ordered = [member for members in by_residual.values() for member in members]
        return DecodeTile(
            np.asarray(rows, dtype=np.int64),
            start,
            end,
            locate(group[0].span.pages, start, end, self._page_size),
            tuple(residuals),
            _hidden(ordered, start, end),
        )

    def _residual_key(self, member: _Member, start: int, end: int) -> tuple[int, bytes, MergedUse | None] | None:
        residual = member.span.residual
        if residual is None or residual.num_tokens < end:
            return None
        pages = residual.pages[start // self._page_size : -(-end // self._page_size)]
        # Whole K made for forks of two depths are two: each has to be written, and is read with strides of its own.
        return residual.adapter_slot, pages.tobytes(), residual.merged_keys


def _hidden(members: Sequence[_Member], start: int, end: int) -> npt.NDArray[np.bool_] | None:
    positions = np.concatenate([m.span.start_pos + np.arange(m.span.num_rows) for m in members])
    if positions.min() >= end - 1:
        return None
    hidden: npt.NDArray[np.bool_] = np.arange(start, end)[None, :] > positions[:, None]
    return hidden
