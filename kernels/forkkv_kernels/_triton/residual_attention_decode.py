"""Decode: one query row a sequence over base pages and its adapter's residual, split over keys. See ``ops`` for the contract.

All products have keys on the long side, S^T = K q^T and O^T = V^T P^T: the rows of one kv head are few (g of them, padded to
8), and padding is paid on them only. The cost of one sequence, kv head and tile of 64 keys at D 128, rank 16:

    bytes       K and V 32 KiB, residuals 4 KiB (read once from memory, by the other kv heads from L2)
    products    S^T and O^T 2 x 64*128*8, y = a B 64*16*128, R(y) q^T 64*128*8, P a_v 64*16*8: 0.34 M multiply-adds
    elsewhere   rotation 2 operations for each of 64*128 elements

so that memory is the limit by a factor of five on an H100. Programs of the kv heads of one sequence and split are neighbours
in the grid, so that residual rows come from L2 and a token's heads from one stretch of memory.
"""

# ruff: noqa: RUF005, SIM108 (Triton compiles a part of Python: no starred tuples, no conditional expressions over tensors)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant
from forkkv_kernels._triton.decode_configs import DecodeConfig, decode_config
from forkkv_kernels._triton.tiles import (
    load_base,
    load_factor,
    load_factor_halves,
    load_key_scale,
    load_page_ids,
    load_query_halves,
    load_residual_rows,
    offset_angles,
    page_slots,
    residual_of,
    rotated_back,
    rotated_tile,
    slots_of,
    softmax_step,
)
from forkkv_kernels.reference.combine_partials import Partials
from forkkv_kernels.reference.residual_attention_decode import DecodeRows
from forkkv_kernels.reference.residuals import Residuals

LOG2_E = 1.4426950408889634
NO_RESIDUALS = (
    "residual_pages_ptr", "residual_lens_ptr", "adapters_ptr", "b_k_ptr", "b_v_ptr", "ranks_ptr", "rank_class_ptr",
    "norm_column_ptr", "change_column_ptr", "cos_sin_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=["num_positions", "base_pages_stride", "residual_pages_stride", "first_split", "out_splits"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, base_pages_ptr, kv_starts_ptr, kv_lens_ptr, residual_pages_ptr, residual_lens_ptr, adapters_ptr,
    b_k_ptr, b_v_ptr, ranks_ptr, rank_class_ptr, norm_column_ptr, change_column_ptr, cos_sin_ptr, out_ptr, lse_ptr,
    scale_log2, num_positions, q_stride, base_pages_stride, residual_pages_stride, first_split, out_splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, RANK: tl.constexpr,
    HAS_KEY_SCALE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    num_splits = tl.num_programs(1)
    WIDTH: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    half: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16

    first = tl.load(kv_starts_ptr + sequence) if kv_starts_ptr is not None else 0
    kv_len = tl.load(kv_lens_ptr + sequence)
    num_tiles = tl.cdiv(tl.maximum(kv_len - first, 0), BLOCK_N)
    start = first + num_tiles * split // num_splits * BLOCK_N
    end = tl.minimum(first + num_tiles * (split + 1) // num_splits * BLOCK_N, kv_len)

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    is_row = rows < GROUP
    heads = head * GROUP + rows
    lse_at = lse_ptr + (sequence.to(tl.int64) * NUM_KV_HEADS * GROUP + heads) * out_splits + first_split + split
    if start >= end:
        tl.store(lse_at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=is_row)
        return

    q_row = q_ptr + sequence.to(tl.int64) * q_stride
    q = tl.load(
        q_row + heads[None, :] * HEAD_DIM + columns[:, None], mask=is_row[None, :] & (columns < HEAD_DIM)[:, None], other=0.0
    )
    base_pages = base_pages_ptr + sequence.to(tl.int64) * base_pages_stride
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    offsets = tl.arange(0, BLOCK_N)

    plain_start = start
    if RANK > 0:
        adapter = tl.load(adapters_ptr + sequence)
        residual_len = tl.load(residual_lens_ptr + sequence)
        residual_end = tl.minimum(end, tl.where(adapter >= 0, residual_len, 0))
        if start < residual_end:
            BLOCK_R: tl.constexpr = RANK
            NUM_F: tl.constexpr = (HEAD_DIM // 2 + BLOCK_H - 1) // BLOCK_H
            rank_k = tl.load(ranks_ptr + 2 * adapter)
            rank_v = tl.load(ranks_ptr + 2 * adapter + 1)
            rank_class = tl.load(rank_class_ptr + adapter)
            b_k = ()
            cos = ()
            sin = ()
            for first_f in tl.static_range(0, HEAD_DIM // 2, BLOCK_H):
                factor = load_factor_halves(b_k_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, BLOCK_R, BLOCK_H, first_f)
                b_k = b_k + (factor.to(half),)
                c, s = offset_angles(cos_sin_ptr, num_positions, HEAD_DIM, BLOCK_N, BLOCK_H, first_f)
                cos = cos + (c.to(half),)
                sin = sin + (s.to(half),)
            residual_pages = residual_pages_ptr + sequence.to(tl.int64) * residual_pages_stride
            if HAS_KEY_SCALE:
                norm_column = tl.load(norm_column_ptr + adapter)
                change_column = tl.load(change_column_ptr + adapter)
            recalled = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
            pages = load_page_ids(base_pages, start + offsets, start + offsets < end, PAGE_SIZE)
            residual_slots = page_slots(residual_pages, start + offsets, start + offsets < residual_end, PAGE_SIZE)
            # Residual rows wait in registers for a tile: 4 a thread at rank 16, where a ring in shared memory would cost the
            # second program of a multiprocessor.
            next_mask = start + offsets < residual_end
            next_k = load_residual_rows(k_ptr, residual_slots, next_mask, rank_class, BLOCK_R)
            next_v = load_residual_rows(v_ptr, residual_slots, next_mask, rank_class, BLOCK_R)
            following = start + BLOCK_N + offsets
            residual_page_ids = load_page_ids(residual_pages, following, following < residual_end, PAGE_SIZE)
            for tile in range(start, residual_end, BLOCK_N):
                positions = tile + offsets
                mask = positions < end
                has_residual = positions < residual_end
                slots = slots_of(pages, positions, PAGE_SIZE)
                k = load_base(k_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_D)
                v = load_base(v_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_D)
                a_k = residual_of(next_k, rank_k, BLOCK_R)
                a_v = next_v  # what lies beyond the rank stays in rows of its own, which are dropped at the end
                if HAS_KEY_SCALE:
                    is_scaled = has_residual & (norm_column >= 0)
                    norm = load_key_scale(k_ptr, residual_slots, is_scaled, rank_class, norm_column + head)
                    change = load_key_scale(v_ptr, residual_slots, is_scaled, rank_class, change_column + head)
                    norm = tl.where(norm_column >= 0, norm, 1.0)
                following = positions + BLOCK_N
                pages = load_page_ids(base_pages, following, following < end, PAGE_SIZE)
                residual_slots = slots_of(residual_page_ids, following, PAGE_SIZE)
                next_k = load_residual_rows(k_ptr, residual_slots, following < residual_end, rank_class, BLOCK_R)
                next_v = load_residual_rows(v_ptr, residual_slots, following < residual_end, rank_class, BLOCK_R)
                following += BLOCK_N
                residual_page_ids = load_page_ids(residual_pages, following, following < residual_end, PAGE_SIZE)
                scores = tl.dot(k, q, input_precision=PRECISION)
                added = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) if HAS_KEY_SCALE else scores
                for f in tl.static_range(0, NUM_F):
                    y = tl.dot(a_k.to(half), b_k[f], input_precision=PRECISION, out_dtype=half)
                    y = rotated_tile(y, cos[f], sin[f], BLOCK_N, BLOCK_H)
                    own, crossed = load_query_halves(q_row, heads * HEAD_DIM, is_row, HEAD_DIM, BLOCK_H, f * BLOCK_H)
                    back = rotated_back(own.to(half), crossed.to(half), cos_sin_ptr, tile, HEAD_DIM, BLOCK_H, f * BLOCK_H)
                    added = tl.dot(y, back, added, input_precision=PRECISION)
                if HAS_KEY_SCALE:
                    scores = scores * (1.0 + change)[:, None] + added * norm[:, None]
                else:
                    scores = added
                scores = tl.where(mask[:, None], scores, float("-inf"))
                weights, correction, highest, total = softmax_step(scores, scale_log2, highest, total)
                p = weights.to(dtype)
                output = tl.dot(tl.trans(v), p, output * correction[None, :], input_precision=PRECISION)
                recalled = tl.dot(tl.trans(a_v), p, recalled * correction[None, :], input_precision=PRECISION)
            plain_start = start + tl.cdiv(residual_end - start, BLOCK_N) * BLOCK_N
            b_v = load_factor(b_v_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, BLOCK_R, BLOCK_D)
            recalled = tl.where((tl.arange(0, BLOCK_R) < rank_v)[:, None], recalled, 0.0)
            # In fp32, as the sums are: bf16 would round sums over the whole split.
            output = tl.dot(tl.trans(b_v).to(tl.float32), recalled, output, input_precision=PRECISION)

    pages = load_page_ids(base_pages, plain_start + offsets, plain_start + offsets < end, PAGE_SIZE)
    for tile in range(plain_start, end, BLOCK_N):
        positions = tile + offsets
        mask = positions < end
        slots = slots_of(pages, positions, PAGE_SIZE)
        k = load_base(k_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_D)
        v = load_base(v_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_D)
        pages = load_page_ids(base_pages, positions + BLOCK_N, positions + BLOCK_N < end, PAGE_SIZE)
        scores = tl.dot(k, q, input_precision=PRECISION)
        scores = tl.where(mask[:, None], scores, float("-inf"))
        weights, correction, highest, total = softmax_step(scores, scale_log2, highest, total)
        output = tl.dot(tl.trans(v), weights.to(dtype), output * correction[None, :], input_precision=PRECISION)

    sums = tl.sum(total, axis=0)
    out_at = out_ptr + ((sequence.to(tl.int64) * NUM_KV_HEADS * GROUP + heads) * out_splits + first_split + split) * HEAD_DIM
    tl.store(out_at[None, :] + columns[:, None], output / sums[None, :], mask=is_row[None, :] & (columns < HEAD_DIM)[:, None])
    tl.store(lse_at, (highest + tl.log2(sums)) * 0.6931471805599453, mask=is_row)


def decode(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: DecodeRows,
    scale: float,
    partials: Partials,
    splits: range,
    residuals: Residuals | None,
    config: DecodeConfig | None = None,
) -> None:
    """``config`` overrides the card's, for tuning."""
    num_sequences, num_heads, head_dim = q.shape
    group = num_heads // rows.num_kv_heads
    rank = residuals.b_k.shape[1] if residuals is not None else 0
    config = config or decode_config(head_dim, group, q.element_size(), rank)
    if num_sequences == 0 or not splits:
        return
    decode_kernel[(rows.num_kv_heads, len(splits), num_sequences)](
        q, k_plane, v_plane, rows.base_pages, rows.kv_starts, rows.kv_lens, *residual_arguments(residuals),
        partials.out, partials.lse, scale * LOG2_E, len(residuals.cos_sin) if residuals is not None else 0,
        q.stride(0), rows.base_pages.stride(0), residuals.pages.stride(0) if residuals is not None else 0,
        splits.start, partials.num_splits, NUM_KV_HEADS=rows.num_kv_heads, PAGE_SIZE=rows.page_size, RANK=rank,
        HAS_KEY_SCALE=residuals is not None and residuals.norm_column is not None,
        **_constants(head_dim, group, q.dtype == torch.float32, config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def residual_arguments(residuals: Residuals | None) -> tuple[Tensor | None, ...]:
    if residuals is None:
        return (None,) * 10
    return (
        residuals.pages, residuals.lens, residuals.adapters, residuals.b_k, residuals.b_v, residuals.ranks,
        residuals.rank_class, residuals.norm_column, residuals.change_column, residuals.cos_sin,
    )  # fmt: skip


def _constants(head_dim: int, group: int, is_exact: bool, config: DecodeConfig) -> dict[str, Any]:
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PRECISION": "ieee" if is_exact else "tf32",
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),  # a product's inner axis is 16 long at least
        "BLOCK_H": config.block_h,
    }


def aot_variants() -> list[AotVariant]:
    """Llama-3.1-8B with and without adapters, Qwen3 (key scales), Qwen2.5-7B (7 rows a kv head) at rank 64."""
    return [
        _variant("bf16", 8, 4, 128, 0),
        _variant("bf16", 8, 4, 128, 16, {80: 80, 90: 32}),  # spilled before the loop over tiles, read after it
        _variant("fp16", 8, 4, 128, 16, {80: 128, 90: 48}, has_key_scale=True),
        _variant("bf16", 4, 7, 128, 64, {80: 1600, 90: 112}),
    ]


def _variant(
    dtype: str, num_kv_heads: int, group: int, head_dim: int, rank: int, max_local_bytes: int | dict[int, int] = 0,
    has_key_scale: bool = False, page_size: int = 16,
) -> AotVariant:  # fmt: skip
    config = decode_config(head_dim, group, 2, rank)
    constants = {
        "NUM_KV_HEADS": num_kv_heads, "PAGE_SIZE": page_size, "RANK": rank, "HAS_KEY_SCALE": has_key_scale,
        **_constants(head_dim, group, False, config), "kv_starts_ptr": None,
    }  # fmt: skip
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "b_k_ptr", "b_v_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("base_pages_ptr", "kv_lens_ptr", "residual_pages_ptr", "residual_lens_ptr"), "*i32")
    signature |= dict.fromkeys(("adapters_ptr", "ranks_ptr", "rank_class_ptr", "norm_column_ptr", "change_column_ptr"), "*i32")
    signature |= dict.fromkeys(("cos_sin_ptr", "out_ptr", "lse_ptr"), "*fp32") | {"scale_log2": "fp32"}
    signature |= dict.fromkeys(("num_positions", "base_pages_stride", "residual_pages_stride", "first_split"), "i32")
    signature |= {"q_stride": "i32:16", "out_splits": "i32"}
    for name in NO_RESIDUALS if rank == 0 else () if has_key_scale else ("norm_column_ptr", "change_column_ptr"):
        del signature[name]
        constants[name] = None
    name = f"decode_{dtype}_{num_kv_heads}x{group}x{head_dim}_r{rank}{'_scaled' if has_key_scale else ''}"
    return AotVariant(decode_kernel, signature, constants, config.num_warps, config.num_stages, name, max_local_bytes)
