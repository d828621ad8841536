"""The kernel of ``residual_attention_extend``. See ``ops`` for the contract.

A program has one kv head and BLOCK_M // g consecutive rows of one sequence, the g query heads of each side by side, so that K
of a tile is loaded (and, under an adapter, rebuilt) once for all of them. Keys that every row sees come first and unmasked,
those around the diagonal last. Where K is rebuilt in the loop, positions with a residual and plain ones have loops of their
own: plain ones cost what they cost without adapters.

What a residual costs, at D 128, rank 16, BLOCK_M 128 and tiles of 64 keys, where a plain tile is 2 x 128*64*128 multiply-adds
(1,024 clocks of an H100's multiprocessor at its peak):

    in the loop     a B_k 64*16*128 and P a_v 128*64*16 (12 % more), some ten operations for each of the 64*128 elements of K
                    (640 clocks of its other units), K by way of registers, and 32 KiB of cos|sin beside 32 KiB of K and V
    by rebuild_kv   nothing in the loop; once, 2 * S * Hkv * D elements of K and V read and as many written

The second is 5 % at 512 rows and 1 % at 2,048 whatever the context is, the first stays: few rows rebuild in the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from forkkv_kernels._triton.extend_tiles import (
    dot,
    find_sequence,
    load_key_scales,
    load_rotation,
    rebuilt_k,
    residual_of,
    shrunk,
    softmax_step,
    tile_pages,
    tile_slots,
)
from forkkv_kernels._triton.tiles import load_base, load_factor, load_factor_half, load_residual


@triton.jit
def _plain_tiles(
    state, q, limits, k_ptr, v_ptr, pages_ptr, rebuilt, scale, low, high, head,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_REBUILT: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Positions [low, high) as they lie in memory: in base pages, or before ``rebuilt_end`` where they were rebuilt."""
    acc, total, highest = state
    rebuilt_k_ptr, rebuilt_v_ptr, rebuilt_first, rebuilt_end = rebuilt
    pages = tile_pages(pages_ptr, low, high, PAGE_SIZE, BLOCK_N)
    for start in tl.range(low, high, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        mask = tl.full([BLOCK_N], True, tl.int1)
        if IS_MASKED:
            mask = positions < high
        first, slots = tile_slots(pages, start, PAGE_SIZE, BLOCK_N)
        pages = tile_pages(pages_ptr, start + BLOCK_N, high, PAGE_SIZE, BLOCK_N)
        k_tile_ptr, v_tile_ptr = k_ptr, v_ptr
        if HAS_REBUILT:
            is_rebuilt = start < rebuilt_end
            k_tile_ptr = tl.where(is_rebuilt, rebuilt_k_ptr, k_ptr)
            v_tile_ptr = tl.where(is_rebuilt, rebuilt_v_ptr, v_ptr)
            first = tl.where(is_rebuilt, rebuilt_first + start, first)
            if PAGE_SIZE % BLOCK_N != 0:
                slots = tl.where(is_rebuilt, tl.arange(0, BLOCK_N), slots)
        k = load_base(k_tile_ptr + first * WIDTH, slots, mask, head, WIDTH, HEAD_DIM, acc.shape[1])
        scores = dot(q, tl.trans(k))
        weights, acc, _, total, highest = softmax_step(scores, acc, total, highest, scale, positions, limits, IS_MASKED)
        v = load_base(v_tile_ptr + first * WIDTH, slots, mask, head, WIDTH, HEAD_DIM, acc.shape[1])
        acc = dot(weights.to(v.dtype), v, acc)
    return acc, total, highest


@triton.jit
def _residual_tiles(
    state, acc_r, q_halves, b_halves, limits, k_ptr, v_ptr, pages_ptr, residual, residual_len, cos_sin_ptr, scale, low, high,
    head,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_KEY_SCALE: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Positions [low, high), those before ``residual_len`` with their residual: K rebuilt, acc_r = P a_v beside acc = P V."""
    acc, total, highest = state
    q1, q2 = q_halves
    b1, b2 = b_halves
    own_pages_ptr, rank_class, rank_k, rank_v, _, _ = residual
    BLOCK_D: tl.constexpr = acc.shape[1]
    BLOCK_R: tl.constexpr = acc_r.shape[1]
    own_end = tl.minimum(residual_len, high)
    pages = tile_pages(pages_ptr, low, high, PAGE_SIZE, BLOCK_N)
    own_pages = tile_pages(own_pages_ptr, low, own_end, PAGE_SIZE, BLOCK_N)
    for start in tl.range(low, high, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        has_residual = positions < own_end
        mask = tl.full([BLOCK_N], True, tl.int1)
        if IS_MASKED:
            mask = positions < high
        first, slots = tile_slots(pages, start, PAGE_SIZE, BLOCK_N)
        own_first, own_slots = tile_slots(own_pages, start, PAGE_SIZE, BLOCK_N)
        pages = tile_pages(pages_ptr, start + BLOCK_N, high, PAGE_SIZE, BLOCK_N)
        own_pages = tile_pages(own_pages_ptr, start + BLOCK_N, own_end, PAGE_SIZE, BLOCK_N)
        own_slots += own_first
        a_k = load_residual(k_ptr, own_slots, has_residual, rank_class, rank_k, BLOCK_R)
        norm, change = load_key_scales(k_ptr, v_ptr, own_slots, has_residual, residual, head, HAS_KEY_SCALE)
        cos, sin = load_rotation(cos_sin_ptr, positions, mask, HEAD_DIM, BLOCK_D // 2)
        k1, k2 = rebuilt_k(
            a_k, b1, b2, cos, sin, norm, change, k_ptr + first * WIDTH, slots, mask, head,
            WIDTH, HEAD_DIM, BLOCK_D // 2, HAS_KEY_SCALE,
        )  # fmt: skip
        scores = dot(q2, tl.trans(k2), dot(q1, tl.trans(k1)))
        weights, acc, shrink, total, highest = softmax_step(scores, acc, total, highest, scale, positions, limits, IS_MASKED)
        v = load_base(v_ptr + first * WIDTH, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_D)
        weights = weights.to(v.dtype)
        acc = dot(weights, v, acc)
        a_v = load_residual(v_ptr, own_slots, has_residual, rank_class, rank_v, BLOCK_R)
        acc_r = dot(weights, a_v, acc_r * shrink[:, None])
    return (acc, total, highest), acc_r


@triton.jit
def extend_kernel(
    out_ptr, q_ptr, k_ptr, v_ptr, rebuilt_k_ptr, rebuilt_v_ptr, query_starts_ptr, start_pos_ptr, base_pages_ptr,
    residual_pages_ptr, residual_lens_ptr, adapters_ptr, b_k_ptr, b_v_ptr, ranks_ptr, rank_class_ptr, norm_column_ptr,
    change_column_ptr, cos_sin_ptr,
    scale_log2, num_sequences, q_stride, base_pages_stride, residual_pages_stride, rebuilt_tokens,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    RANK: tl.constexpr, RESIDUAL: tl.constexpr, HAS_KEY_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """RESIDUAL: "none", "tile" (rebuilt in the loop) or "rebuilt" (by ``rebuild_kv_kernel``, before)."""
    WIDTH: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    ROWS: tl.constexpr = BLOCK_M // GROUP
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # late rows see the most keys: they start first
    head = tl.program_id(1)
    sequence = find_sequence(query_starts_ptr, block, num_sequences, ROWS)
    first_row = tl.load(query_starts_ptr + sequence)
    num_rows = tl.load(query_starts_ptr + sequence + 1) - first_row
    row = (block - first_row // ROWS - sequence) * ROWS
    if row >= num_rows:
        return

    lanes = tl.arange(0, BLOCK_M)
    rows = row + lanes // GROUP
    is_row = (rows < num_rows) & (lanes < ROWS * GROUP)
    rows = tl.minimum(rows, num_rows - 1)  # a lane without a row computes another's and stores nothing
    start_pos = tl.load(start_pos_ptr + sequence)
    limits = start_pos + rows
    end = start_pos + tl.minimum(row + ROWS, num_rows)
    unmasked_end = (start_pos + row + 1) // BLOCK_N * BLOCK_N
    row_numbers = (first_row + rows).to(tl.int64)
    heads = head * GROUP + lanes % GROUP
    columns = tl.arange(0, BLOCK_D)
    in_head = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    q_rows_ptr = q_ptr + row_numbers * q_stride + heads * HEAD_DIM
    q = tl.load(q_rows_ptr[:, None] + columns[None, :], mask=in_head, other=0.0)
    pages_ptr = base_pages_ptr + sequence.to(tl.int64) * base_pages_stride

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    state = acc, total, highest
    residual_end = 0
    rebuilt = None, None, 0, 0
    if RESIDUAL != "none":
        adapter = tl.load(adapters_ptr + sequence)
        residual_len = tl.where(adapter >= 0, tl.load(residual_lens_ptr + sequence), 0)
        residual_end = tl.minimum(tl.cdiv(residual_len, BLOCK_N) * BLOCK_N, end)
        adapter = tl.maximum(adapter, 0)
    if RESIDUAL == "rebuilt":
        rebuilt = rebuilt_k_ptr, rebuilt_v_ptr, sequence.to(tl.int64) * rebuilt_tokens, residual_end
    if RESIDUAL == "tile":
        acc_r = tl.zeros([BLOCK_M, RANK], tl.float32)
        highest_r = highest  # to which acc_r relates: plain tiles leave it alone
        half_columns = tl.arange(0, BLOCK_D // 2)
        in_half = is_row[:, None] & (half_columns < HEAD_DIM // 2)[None, :]
        q1 = tl.load(q_rows_ptr[:, None] + half_columns[None, :], mask=in_half, other=0.0)
        q2 = tl.load(q_rows_ptr[:, None] + (HEAD_DIM // 2 + half_columns)[None, :], mask=in_half, other=0.0)
        b1 = load_factor_half(b_k_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_D // 2, 0)
        b2 = load_factor_half(b_k_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_D // 2, 1)
        own_pages_ptr = residual_pages_ptr + sequence.to(tl.int64) * residual_pages_stride
        residual = residual_of(
            adapter, own_pages_ptr, ranks_ptr, rank_class_ptr, norm_column_ptr, change_column_ptr, HAS_KEY_SCALE
        )

    for IS_MASKED in tl.static_range(2):
        low, high = (unmasked_end, end) if IS_MASKED else (0, unmasked_end)
        if RESIDUAL == "tile":
            middle = tl.minimum(tl.maximum(residual_end, low), high)
            acc_r *= shrunk(highest_r, state[2])[:, None]
            state, acc_r = _residual_tiles(
                state, acc_r, (q1, q2), (b1, b2), limits, k_ptr, v_ptr, pages_ptr, residual, residual_len, cos_sin_ptr,
                scale_log2, low, middle, head, WIDTH, HEAD_DIM, PAGE_SIZE, HAS_KEY_SCALE, BLOCK_N, IS_MASKED,
            )  # fmt: skip
            highest_r = state[2]
            low = middle
        state = _plain_tiles(
            state, q, limits, k_ptr, v_ptr, pages_ptr, rebuilt, scale_log2, low, high, head,
            WIDTH, HEAD_DIM, PAGE_SIZE, RESIDUAL == "rebuilt", BLOCK_N, IS_MASKED,
        )  # fmt: skip

    acc, total, highest = state
    out = acc / total[:, None]
    if RESIDUAL == "tile":
        b_v = load_factor(b_v_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_D)
        acc_r *= (shrunk(highest_r, highest) / total)[:, None]
        out = dot(acc_r.to(b_v.dtype), b_v, out)
    out_rows_ptr = out_ptr + row_numbers * (NUM_KV_HEADS * GROUP * HEAD_DIM) + heads * HEAD_DIM
    tl.store(out_rows_ptr[:, None] + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=in_head)
