"""K, or K and V, of sequences with a residual, from base and residual pages into memory of their own, one position behind the
other: what ``residual_attention_extend`` reads in place of base pages."""

from __future__ import annotations

import triton
import triton.language as tl

from forkkv_kernels._triton.extend_tiles import dot
from forkkv_kernels._triton.tiles import (
    load_base,
    load_base_half,
    load_factor,
    load_factor_half,
    load_key_scale,
    load_residual,
    page_slots,
    rotated_halves,
)


@triton.jit(do_not_specialize=["base_pages_stride", "residual_pages_stride", "rebuilt_tokens"])
def rebuild_kv_kernel(
    rebuilt_k_ptr, rebuilt_v_ptr, rebuilt_pages_ptr, k_ptr, v_ptr, query_starts_ptr, start_pos_ptr, base_pages_ptr,
    residual_pages_ptr, residual_lens_ptr, adapters_ptr, b_k_ptr, b_v_ptr, ranks_ptr, rank_class_ptr, norm_column_ptr,
    change_column_ptr, cos_sin_ptr, base_pages_stride, residual_pages_stride, rebuilt_tokens,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, RANK: tl.constexpr,
    HAS_KEY_SCALE: tl.constexpr, HAS_V: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (sequence, tile, group of HEADS kv heads) writes BLOCK_N positions of K and V [N, rebuilt_tokens, NUM_KV_HEADS,
    HEAD_DIM]; positions behind the residual are copies. K is rounded once: Kb + R(a B), with QK-norm (1 + change) Kb +
    norm R(a B). rebuilt_pages becomes their page table: page p is the p-th. Sequences are neighbours in the grid: those
    that share base pages read them from cache."""
    WIDTH: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_H: tl.constexpr = BLOCK_D // 2
    start = tl.program_id(1) * BLOCK_N
    sequence = tl.program_id(0)
    positions = start + tl.arange(0, BLOCK_N)
    if (sequence == 0) & (tl.program_id(2) == 0):
        tl.store(rebuilt_pages_ptr + positions // PAGE_SIZE, positions // PAGE_SIZE, mask=positions < rebuilt_tokens)
    adapter = tl.load(adapters_ptr + sequence)
    num_rows = tl.load(query_starts_ptr + sequence + 1) - tl.load(query_starts_ptr + sequence)
    end = tl.load(start_pos_ptr + sequence) + num_rows
    residual_len = tl.minimum(tl.load(residual_lens_ptr + sequence), end)
    if (adapter < 0) | (num_rows == 0) | (residual_len == 0) | (start >= end):
        return

    mask = positions < end
    has_residual = positions < residual_len
    slots = page_slots(base_pages_ptr + sequence.to(tl.int64) * base_pages_stride, positions, mask, PAGE_SIZE)
    own_pages_ptr = residual_pages_ptr + sequence.to(tl.int64) * residual_pages_stride
    own_slots = page_slots(own_pages_ptr, positions, has_residual, PAGE_SIZE)
    rank_class = tl.load(rank_class_ptr + adapter)
    a_k = load_residual(k_ptr, own_slots, has_residual, rank_class, tl.load(ranks_ptr + 2 * adapter), RANK)
    if HAS_V:
        a_v = load_residual(v_ptr, own_slots, has_residual, rank_class, tl.load(ranks_ptr + 2 * adapter + 1), RANK)
    if HAS_KEY_SCALE:
        norm_column = tl.load(norm_column_ptr + adapter)
        change_column = tl.load(change_column_ptr + adapter)
        is_scaled = has_residual & (norm_column >= 0)  # -1: the adapter leaves k alone
    columns = tl.arange(0, BLOCK_D)
    half_columns = tl.arange(0, BLOCK_H)
    in_head = mask[:, None] & (columns < HEAD_DIM)[None, :]
    in_half = mask[:, None] & (half_columns < HALF)[None, :]
    angles_ptr = cos_sin_ptr + positions.to(tl.int64)[:, None] * HEAD_DIM + half_columns[None, :]
    cos = tl.load(angles_ptr, mask=in_half, other=0.0)
    sin = tl.load(angles_ptr + HALF, mask=in_half, other=0.0)
    for step in range(HEADS):
        head = tl.program_id(2) * HEADS + step
        b1 = load_factor_half(b_k_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_H, 0)
        b2 = load_factor_half(b_k_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_H, 1)
        k1 = load_base_half(k_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_H, 0).to(tl.float32)
        k2 = load_base_half(k_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_H, 1).to(tl.float32)
        r1, r2 = rotated_halves(dot(a_k, b1), dot(a_k, b2), cos, sin)
        if HAS_KEY_SCALE:
            norm = load_key_scale(k_ptr, own_slots, is_scaled, rank_class, norm_column + head)
            change = load_key_scale(v_ptr, own_slots, is_scaled, rank_class, change_column + head)
            k1 = k1 * (1.0 + change)[:, None] + r1 * norm[:, None]
            k2 = k2 * (1.0 + change)[:, None] + r2 * norm[:, None]
        else:
            k1 += r1
            k2 += r2
        rows = (sequence.to(tl.int64) * rebuilt_tokens + positions) * WIDTH + head * HEAD_DIM
        halves_ptr = rebuilt_k_ptr + rows[:, None] + half_columns[None, :]
        tl.store(halves_ptr, k1.to(rebuilt_k_ptr.dtype.element_ty), mask=in_half)
        tl.store(halves_ptr + HALF, k2.to(rebuilt_k_ptr.dtype.element_ty), mask=in_half)
        if HAS_V:
            b_v = load_factor(b_v_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_D)
            v = load_base(v_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_D).to(tl.float32) + dot(a_v, b_v)
            tl.store(rebuilt_v_ptr + rows[:, None] + columns[None, :], v.to(rebuilt_v_ptr.dtype.element_ty), mask=in_head)
