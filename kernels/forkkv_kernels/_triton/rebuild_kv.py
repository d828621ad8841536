"""K and V of every position with a residual, from base and residual pages into memory of their own: what
``residual_attention_extend`` reads where it is given the room, so that its loop is the plain one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.extend_configs import RebuildConfig, rebuild_config
from forkkv_kernels._triton.extend_tiles import dot, load_key_scales, load_rotation, rebuilt_k, residual_of
from forkkv_kernels._triton.tiles import load_base, load_factor, load_factor_half, load_residual, page_slots
from forkkv_kernels.reference.residual_attention_extend import ExtendResiduals, ExtendRows


@triton.jit
def rebuild_kv_kernel(
    rebuilt_k_ptr, rebuilt_v_ptr, k_ptr, v_ptr, query_starts_ptr, start_pos_ptr, base_pages_ptr, residual_pages_ptr,
    residual_lens_ptr, adapters_ptr, b_k_ptr, b_v_ptr, ranks_ptr, rank_class_ptr, norm_column_ptr, change_column_ptr,
    cos_sin_ptr, base_pages_stride, residual_pages_stride, rebuilt_tokens,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, RANK: tl.constexpr,
    HAS_KEY_SCALE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (tile, sequence, group of HEADS kv heads) writes BLOCK_N positions of K and V [N, rebuilt_tokens, NUM_KV_HEADS,
    HEAD_DIM]. Positions behind the residual, up to a multiple of ALIGN, are copies of their pages: a tile of ALIGN positions
    then lies wholly here or wholly there."""
    WIDTH: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_H: tl.constexpr = BLOCK_D // 2
    start = tl.program_id(0) * BLOCK_N
    sequence = tl.program_id(1)
    adapter = tl.load(adapters_ptr + sequence)
    num_rows = tl.load(query_starts_ptr + sequence + 1) - tl.load(query_starts_ptr + sequence)
    kv_len = tl.load(start_pos_ptr + sequence) + num_rows
    residual_len = tl.minimum(tl.load(residual_lens_ptr + sequence), kv_len)
    end = tl.minimum(tl.cdiv(residual_len, ALIGN) * ALIGN, kv_len)
    if (adapter < 0) | (num_rows == 0) | (start >= end):
        return

    positions = start + tl.arange(0, BLOCK_N)
    mask = positions < end
    has_residual = positions < residual_len
    slots = page_slots(base_pages_ptr + sequence.to(tl.int64) * base_pages_stride, positions, mask, PAGE_SIZE)
    own_pages_ptr = residual_pages_ptr + sequence.to(tl.int64) * residual_pages_stride
    own_slots = page_slots(own_pages_ptr, positions, has_residual, PAGE_SIZE)
    residual = residual_of(adapter, own_pages_ptr, ranks_ptr, rank_class_ptr, norm_column_ptr, change_column_ptr, HAS_KEY_SCALE)
    _, rank_class, rank_k, rank_v, _, _ = residual
    a_k = load_residual(k_ptr, own_slots, has_residual, rank_class, rank_k, RANK)
    a_v = load_residual(v_ptr, own_slots, has_residual, rank_class, rank_v, RANK)
    cos, sin = load_rotation(cos_sin_ptr, positions, mask, HEAD_DIM, BLOCK_H)
    columns = tl.arange(0, BLOCK_D)
    half_columns = tl.arange(0, BLOCK_H)
    in_head = mask[:, None] & (columns < HEAD_DIM)[None, :]
    in_half = mask[:, None] & (half_columns < HALF)[None, :]
    for step in range(HEADS):
        head = tl.program_id(2) * HEADS + step
        norm, change = load_key_scales(k_ptr, v_ptr, own_slots, has_residual, residual, head, HAS_KEY_SCALE)
        b1 = load_factor_half(b_k_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_H, 0)
        b2 = load_factor_half(b_k_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_H, 1)
        k1, k2 = rebuilt_k(
            a_k, b1, b2, cos, sin, norm, change, k_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_H, HAS_KEY_SCALE
        )
        base_v = load_base(v_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_D)
        b_v = load_factor(b_v_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_D)
        v = (base_v.to(tl.float32) + dot(a_v, b_v)).to(base_v.dtype)
        rows = (sequence.to(tl.int64) * rebuilt_tokens + positions) * WIDTH + head * HEAD_DIM
        tl.store(rebuilt_k_ptr + rows[:, None] + half_columns[None, :], k1, mask=in_half)
        tl.store(rebuilt_k_ptr + rows[:, None] + (HALF + half_columns)[None, :], k2, mask=in_half)
        tl.store(rebuilt_v_ptr + rows[:, None] + columns[None, :], v, mask=in_head)


def rebuild_kv(
    workspace: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: ExtendRows,
    residuals: ExtendResiduals,
    block_d: int,
    config: RebuildConfig | None = None,
) -> None:
    """Fills ``workspace`` [2, N, positions, Hkv, D] up to each sequence's residual end."""
    num_sequences, positions, num_kv_heads, head_dim = workspace.shape[1:]
    config = config or rebuild_config(block_d, num_kv_heads)
    grid = (triton.cdiv(positions, config.block_n), num_sequences, num_kv_heads // config.heads)
    rebuild_kv_kernel[grid](
        *workspace, k_plane, v_plane, rows.query_starts, rows.start_pos, rows.base_pages, *residual_tables(residuals),
        rows.base_pages.stride(0), residuals.pages.stride(0), positions,
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE_SIZE=rows.page_size, RANK=residuals.b_k.shape[1],
        HAS_KEY_SCALE=residuals.norm_column is not None, ALIGN=128, BLOCK_N=config.block_n, HEADS=config.heads,
        num_warps=config.num_warps,
    )  # fmt: skip


def residual_tables(residuals: ExtendResiduals | None) -> tuple[Tensor | None, ...]:
    """In the order in which both kernels name them."""
    if residuals is None:
        return (None,) * 10
    return (
        residuals.pages, residuals.lens, residuals.adapters, residuals.b_k, residuals.b_v, residuals.ranks,
        residuals.rank_class, residuals.norm_column, residuals.change_column, residuals.cos_sin,
    )  # fmt: skip
