"""Tiles of attention, as device functions: base pages, residuals, and a residual's K rotated.

A tile is BLOCK_N consecutive positions of one sequence. Offsets into a plane are 64-bit. A masked element is zero; what was
never written may be NaN, so that every mask comes before a product.

A residual's K is y = a B_k, rotated by the position. Its halves are built apart, y1 = a B1 and y2 = a B2, so that the rotation
needs no shuffle:

    R_j(y) = [ y1 cos_j - y2 sin_j | y2 cos_j + y1 sin_j ]

A row of cos|sin for each position of each tile would be as much traffic as K and V of one kv head. Decode does without:
queries are rotated back by the tile's first position p (``rotated_back``), and residuals only by d in [0, BLOCK_N), with a
table that is the same for all tiles (``offset_angles``):

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
def load_page_ids(pages_ptr, positions, mask, PAGE_SIZE: tl.constexpr):
    """The first half of ``page_slots``, for tiles to come: 32 bits a position wait in registers."""
    return tl.load(pages_ptr + positions // PAGE_SIZE, mask=mask, other=0)


@triton.jit
def slots_of(pages, positions, PAGE_SIZE: tl.constexpr):
    """The second half."""
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
def load_residual_rows(plane_ptr, slots, mask, rank_class, BLOCK_R: tl.constexpr):
    """Residual rows of a tile, in whole vectors: [BLOCK_N, BLOCK_R]. A row has ``rank_class`` columns, a multiple of 8; what
    lies beyond the rank is dropped by ``residual_of``, which may come much later."""
    columns = tl.arange(0, BLOCK_R)
    width = (rank_class // 8) * 8  # says to the compiler that rows are aligned
    pointers = plane_ptr + slots[:, None] * width + columns[None, :]
    return tl.load(pointers, mask=mask[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def residual_of(rows, rank, BLOCK_R: tl.constexpr):
    """x A: zero from column ``rank`` on."""
    return tl.where((tl.arange(0, BLOCK_R) < rank)[None, :], rows, 0.0)


@triton.jit
def load_residual(plane_ptr, slots, mask, rank_class, rank, BLOCK_R: tl.constexpr):
    """x A of a tile: [BLOCK_N, BLOCK_R], zero from column ``rank`` on. A row has ``rank_class`` columns, a multiple of 8."""
    return residual_of(load_residual_rows(plane_ptr, slots, mask, rank_class, BLOCK_R), rank, BLOCK_R)


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
def load_factor_halves(
    b_ptr, adapter, head, RANK: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """[B1 | B2] of frequencies [FIRST, FIRST + BLOCK_H): [BLOCK_R, 2 * BLOCK_H], for one product and ``rotated_tile``."""
    rows = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, 2 * BLOCK_H)
    frequency = FIRST + columns % BLOCK_H
    start = (adapter.to(tl.int64) * RANK * NUM_KV_HEADS + head) * HEAD_DIM
    at = frequency + columns // BLOCK_H * (HEAD_DIM // 2)
    pointers = b_ptr + start + rows[:, None] * (NUM_KV_HEADS * HEAD_DIM) + at[None, :]
    return tl.load(pointers, mask=(rows < RANK)[:, None] & (frequency < HEAD_DIM // 2)[None, :], other=0.0)


@triton.jit
def rotated_tile(y, cos, sin, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """R of y [BLOCK_N, 2 * BLOCK_H], halves side by side, by cos and sin [BLOCK_N, BLOCK_H] -> the same shape.

    Each thread holds both halves of what it rotates, so that parting and joining them moves nothing. One tensor for one
    product: with a product for each half ptxas serialises all of a kernel's wgmma.
    """
    y1, y2 = tl.split(tl.trans(tl.reshape(y, (BLOCK_N, 2, BLOCK_H)), (0, 2, 1)))
    joined = tl.join(y1 * cos - y2 * sin, y2 * cos + y1 * sin)
    return tl.reshape(tl.trans(joined, (0, 2, 1)), (BLOCK_N, 2 * BLOCK_H))


@triton.jit
def offset_angles(
    cos_sin_ptr, num_positions, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, FIRST: tl.constexpr = 0
):
    """cos and sin of offsets [0, BLOCK_N) within a tile, from frequency FIRST on: [BLOCK_N, BLOCK_H] fp32 each, without the
    attention factor: row 0 of the table is the factor itself, cos 0."""
    offsets = tl.arange(0, BLOCK_N)
    columns = FIRST + tl.arange(0, BLOCK_H)
    mask = (offsets < num_positions)[:, None] & (columns < HEAD_DIM // 2)[None, :]
    rows = cos_sin_ptr + offsets[:, None] * HEAD_DIM + columns[None, :]
    inverse = 1.0 / tl.load(cos_sin_ptr)
    cos = tl.load(rows, mask=mask, other=0.0) * inverse
    return cos, tl.load(rows + HEAD_DIM // 2, mask=mask, other=0.0) * inverse


@triton.jit
def rotated_halves(y1, y2, cos, sin):
    """R of halves kept apart, all of one shape."""
    return y1 * cos - y2 * sin, y2 * cos + y1 * sin


@triton.jit
def load_query_halves(q_ptr, offsets, is_row, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, FIRST: tl.constexpr = 0):
    """[q1 | q2] and [q2 | -q1] of frequencies [FIRST, FIRST + BLOCK_H) as columns, [2 * BLOCK_H, BLOCK_M] each, for
    ``rotated_back``: heads that begin ``offsets`` [BLOCK_M] elements behind q_ptr, where ``is_row`` [BLOCK_M]."""
    rows = tl.arange(0, 2 * BLOCK_H)
    frequency = FIRST + rows % BLOCK_H
    is_second = rows // BLOCK_H
    mask = is_row[None, :] & (frequency < HEAD_DIM // 2)[:, None]
    pointers = q_ptr + offsets[None, :] + frequency[:, None]
    q = tl.load(pointers + (is_second * (HEAD_DIM // 2))[:, None], mask=mask, other=0.0)
    other = tl.load(pointers + ((1 - is_second) * (HEAD_DIM // 2))[:, None], mask=mask, other=0.0)
    return q, tl.where(is_second[:, None] == 1, -other, other)


@triton.jit
def rotated_back(q, crossed, cos_sin_ptr, position, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, FIRST: tl.constexpr = 0):
    """R_(-p) of q by position p, of what ``load_query_halves`` gave and in its dtype: [2 * BLOCK_H, BLOCK_M]."""
    frequency = FIRST + tl.arange(0, 2 * BLOCK_H) % BLOCK_H
    mask = frequency < HEAD_DIM // 2
    row = cos_sin_ptr + position * HEAD_DIM + frequency
    cos = tl.load(row, mask=mask, other=0.0)
    sin = tl.load(row + HEAD_DIM // 2, mask=mask, other=0.0)
    return q * cos.to(q.dtype)[:, None] + crossed * sin.to(q.dtype)[:, None]


@triton.jit
def softmax_step(scores, scale_log2, highest, total):
    """scores [BLOCK_N, BLOCK_M] not scaled, scale_log2 > 0 -> (weights, correction [BLOCK_M], highest [BLOCK_M], total).

    ``highest`` is of scaled scores, in powers of two. ``total`` [BLOCK_N, BLOCK_M] is kept for each key of a tile and summed
    after the last: one sum over keys less a tile.
    """
    new_highest = tl.maximum(highest, tl.max(scores, axis=0) * scale_log2)
    correction = tl.exp2(highest - new_highest)
    weights = tl.exp2(scores * scale_log2 - new_highest[None, :])
    return weights, correction, new_highest, total * correction[None, :] + weights
