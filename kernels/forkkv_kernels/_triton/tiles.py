"""Tiles of attention, as device functions: base pages, residuals, and a residual's K rotated.

A tile is BLOCK_N consecutive positions of one sequence. Offsets into a plane are 64-bit. A masked element is zero; what was
never written may be NaN, so that every mask comes before a product.

A residual's K is y = a B_k, rotated by the position. Its halves are built apart, y1 = a B1 and y2 = a B2, so that the rotation
needs no shuffle:

    R_j(y) = [ y1 cos_j - y2 sin_j | y2 cos_j + y1 sin_j ]

A row of cos|sin for each position of each tile would be as much traffic as K and V of one kv head. Position p + d is reached
from one row for the tile's first position p and a table for d in [0, BLOCK_N) that is the same for all tiles. Either rows are
added (``added_angles``), or queries are rotated back by p (``rotated_back``) and residuals only by d:

    q . R_(p + d)(y) = R_(-p)(q) . R_d(y)

which is less work where there are fewer queries than keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_slots(pages_ptr, positions, mask, PAGE_SIZE: tl.constexpr):
    """int64 slots of ``positions`` [BLOCK_N] by a row of a page table; entries outside ``mask`` are not read."""
    pages = tl.load(pages_ptr + positions // PAGE_SIZE, mask=mask, other=0)
    return pages.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE


@triton.jit
def load_base(plane_ptr, slots, mask, head, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One kv head's K or V of a tile: [BLOCK_N, BLOCK_D] in the plane's dtype. WIDTH is Hkv * D."""
    columns = tl.arange(0, BLOCK_D)
    pointers = plane_ptr + slots[:, None] * WIDTH + head * HEAD_DIM + columns[None, :]
    if BLOCK_D == HEAD_DIM:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.load(pointers, mask=mask[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_base_half(
    plane_ptr, slots, mask, head, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr
):
    """Columns [0, D/2) (HALF 0) or [D/2, D) (HALF 1) of the same: [BLOCK_N, BLOCK_H]."""
    columns = tl.arange(0, BLOCK_H)
    pointers = plane_ptr + slots[:, None] * WIDTH + head * HEAD_DIM + HALF * (HEAD_DIM // 2) + columns[None, :]
    if BLOCK_H * 2 == HEAD_DIM:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.load(pointers, mask=mask[:, None] & (columns < HEAD_DIM // 2)[None, :], other=0.0)


@triton.jit
def load_residual(plane_ptr, slots, mask, rank_class, rank, BLOCK_R: tl.constexpr):
    """x A of a tile: [BLOCK_N, BLOCK_R], zero from column ``rank`` on. A row has ``rank_class`` columns, a multiple of 8.

    Columns between rank and rank_class are read, in whole vectors, and dropped.
    """
    columns = tl.arange(0, BLOCK_R)
    width = (rank_class // 8) * 8  # says to the compiler that rows are aligned
    pointers = plane_ptr + slots[:, None] * width + columns[None, :]
    a = tl.load(pointers, mask=mask[:, None] & (columns < width)[None, :], other=0.0)
    return tl.where((columns < rank)[None, :], a, 0.0)


@triton.jit
def load_key_scale(plane_ptr, slots, mask, rank_class, column):
    """``norm`` or ``change`` of a tile under QK-norm, at a kv head's ``column`` of residual rows: [BLOCK_N] fp32."""
    return tl.load(plane_ptr + slots * rank_class + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_factor_half(
    b_ptr, adapter, head, RANK: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """B1 (HALF 0) or B2 of one adapter and kv head out of b [A, RANK, Hkv, D]: [BLOCK_R, BLOCK_H]."""
    rows = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_H)
    start = (adapter.to(tl.int64) * RANK * NUM_KV_HEADS + head) * HEAD_DIM + HALF * (HEAD_DIM // 2)
    pointers = b_ptr + start + rows[:, None] * (NUM_KV_HEADS * HEAD_DIM) + columns[None, :]
    return tl.load(pointers, mask=(rows < RANK)[:, None] & (columns < HEAD_DIM // 2)[None, :], other=0.0)


@triton.jit
def load_factor(
    b_ptr, adapter, head, RANK: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """B of one adapter and kv head: [BLOCK_R, BLOCK_D]."""
    rows = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    start = (adapter.to(tl.int64) * RANK * NUM_KV_HEADS + head) * HEAD_DIM
    pointers = b_ptr + start + rows[:, None] * (NUM_KV_HEADS * HEAD_DIM) + columns[None, :]
    return tl.load(pointers, mask=(rows < RANK)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def angle_row(cos_sin_ptr, position, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """cos and sin of one position, [BLOCK_H] fp32 each, attention factor included."""
    columns = tl.arange(0, BLOCK_H)
    mask = columns < HEAD_DIM // 2
    row = cos_sin_ptr + position.to(tl.int64) * HEAD_DIM + columns
    return tl.load(row, mask=mask, other=0.0), tl.load(row + HEAD_DIM // 2, mask=mask, other=0.0)


@triton.jit
def offset_angles(cos_sin_ptr, num_positions, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """cos and sin of offsets [0, BLOCK_N) within a tile, [BLOCK_N, BLOCK_H] fp32 each, without the attention factor: row 0 of
    the table is the factor itself, cos 0."""
    offsets = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_H)
    mask = (offsets < num_positions)[:, None] & (columns < HEAD_DIM // 2)[None, :]
    rows = cos_sin_ptr + offsets[:, None] * HEAD_DIM + columns[None, :]
    inverse = 1.0 / tl.load(cos_sin_ptr)
    cos = tl.load(rows, mask=mask, other=0.0) * inverse
    return cos, tl.load(rows + HEAD_DIM // 2, mask=mask, other=0.0) * inverse


@triton.jit
def added_angles(row_cos, row_sin, offset_cos, offset_sin):
    """cos and sin of a tile's positions, [BLOCK_N, BLOCK_H] each, of ``angle_row`` at its first and ``offset_angles``."""
    cos = row_cos[None, :] * offset_cos - row_sin[None, :] * offset_sin
    return cos, row_sin[None, :] * offset_cos + row_cos[None, :] * offset_sin


@triton.jit
def rotated_halves(y1, y2, cos, sin):
    """R of halves kept apart, all of one shape."""
    return y1 * cos - y2 * sin, y2 * cos + y1 * sin


@triton.jit
def rotated_back(q1, q2, row_cos, row_sin):
    """R_(-p) of q's halves [BLOCK_H, BLOCK_M] by ``angle_row`` of p."""
    cos = row_cos[:, None]
    sin = row_sin[:, None]
    return q1 * cos + q2 * sin, q2 * cos - q1 * sin
