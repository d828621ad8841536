"""Decode rows of agents that share a run of base pages, the run read once for all of them. See ``ops`` for the contract.

A program takes one kv head, one split of a group's run and all rows of the group's members, BLOCK_M = members * g of them,
as columns: S^T = K q^T and O^T = V^T P^T with keys on the long side. Scores of the members' residual keys come from
``residual_scores``, worked out before. P a_v comes for all members in one product with their residual rows side by side; what
one member's rows make of another's columns is dropped at the end, where B_v comes once.

Multiply-adds of one kv head and tile of 64 keys at D 128, rank 16, 32 agents of g 4 in groups of 8, whatever their adapters:
2 * 64*128*128 = 2.1 M for S^T and O^T, 4 groups * 64*128*32 = 1.0 M for P a_v. Bytes over 32k keys and 8 kv heads: base pages
once (134 MB), a_v (34 MB) and scores (67 MB) from memory; from L2 base pages once a group, a_v once a kv head, 0.8 GB.

A transposed operand has to come out of one of the compiler's rings of pipelined loads: where it was loaded into registers and
stored from there, the product was wrong on an H100, silently (Triton 3.6, bf16 and fp16, not in the interpreter).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant
from forkkv_kernels._triton.decode_configs import GroupedConfig, ScoresConfig, grouped_config
from forkkv_kernels._triton.member_tiles import by_columns, key_scales, member_starts, owners_of, stacked_rows, tile_slots
from forkkv_kernels._triton.residual_attention_decode import LOG2_E
from forkkv_kernels._triton.residual_scores import residual_scores
from forkkv_kernels._triton.tiles import softmax_step
from forkkv_kernels.reference.combine_partials import Partials
from forkkv_kernels.reference.residual_attention_decode import DecodeRows
from forkkv_kernels.reference.residual_attention_grouped import SharedRuns
from forkkv_kernels.reference.residuals import Residuals
from forkkv_kernels.reference.rope_basis import RopeBasis


@triton.jit
def recalled_values(
    recalled, b_v_ptr, ranks_ptr, subgroups_ptr, first_subgroup, end_subgroup, member, head, half: tl.constexpr,
    PRECISION: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """B_v^T of each column's member [BLOCK_M] times ``recalled`` [MEMBERS * RANK, BLOCK_M] -> [BLOCK_D, BLOCK_M]."""
    row = tl.arange(0, MEMBERS * RANK)
    adapter, _ = owners_of(subgroups_ptr, first_subgroup, end_subgroup, row // RANK)
    has_adapter = adapter >= 0
    is_used = has_adapter & (row % RANK < tl.load(ranks_ptr + 2 * adapter + 1, mask=has_adapter, other=0))
    is_own = is_used[:, None] & ((row // RANK)[:, None] == member[None, :])
    own = tl.where(is_own, recalled, 0.0).to(half)
    dims = tl.arange(0, BLOCK_D)
    start = ((tl.maximum(adapter, 0).to(tl.int64) * RANK + row % RANK) * NUM_KV_HEADS + head) * HEAD_DIM
    b_v = tl.load(b_v_ptr + start[:, None] + dims[None, :], mask=is_used[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    # Members on the side of rows: a warpgroup's product of a transposed b_v in registers gave wrong numbers.
    return tl.trans(tl.dot(tl.trans(own), b_v.to(half), input_precision=PRECISION))


@triton.jit(do_not_specialize=["base_pages_stride", "residual_pages_stride", "out_splits", "num_positions"])
def grouped_kernel(
    q_ptr, k_ptr, v_ptr, base_pages_ptr, groups_ptr, members_ptr, subgroups_ptr, residual_pages_ptr, b_v_ptr, ranks_ptr,
    rank_class_ptr, change_column_ptr, scores_ptr, out_ptr, lse_ptr, scale_log2, q_stride, base_pages_stride,
    residual_pages_stride, out_splits, num_positions,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, RANK: tl.constexpr,
    HAS_K: tl.constexpr, HAS_KEY_SCALE: tl.constexpr, PRECISION: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    split = tl.program_id(1)
    group = tl.program_id(2)
    num_splits = tl.num_programs(1)
    WIDTH: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    BLOCK_M: tl.constexpr = MEMBERS * BLOCK_G
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    half: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16

    entry = groups_ptr + group * 6
    num_tokens = tl.load(entry + 1)
    if num_tokens == 0:  # no group: where it begins is garbage, perhaps amid a tile
        return
    first = tl.load(entry)
    run_end = first + num_tokens
    first_split = tl.load(entry + 3)
    # Tiles begin at multiples of their size, so that each lies in one chunk.
    first_tile = first // BLOCK_N
    num_tiles = tl.cdiv(run_end, BLOCK_N) - first_tile
    start = (first_tile + num_tiles * split // num_splits) * BLOCK_N
    end = (first_tile + num_tiles * (split + 1) // num_splits) * BLOCK_N

    column = tl.arange(0, BLOCK_M)
    if BLOCK_G == 1:
        member = column
        of_member = column * 0
    else:
        member = column // 2 % MEMBERS
        of_member = column // (2 * MEMBERS) * 2 + column % 2
    sequence = tl.load(members_ptr + group * MEMBERS + member)
    is_row = (sequence >= 0) & (of_member < GROUP)
    sequence = tl.where(is_row, sequence, 0).to(tl.int64)
    heads = head * GROUP + of_member
    lse_at = lse_ptr + (sequence * NUM_KV_HEADS * GROUP + heads) * out_splits + first_split + split
    if start >= end:
        tl.store(lse_at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=is_row)
        return

    base_pages = base_pages_ptr + tl.load(entry + 2).to(tl.int64) * base_pages_stride
    dims = tl.arange(0, BLOCK_D)
    q_rows = sequence * q_stride + heads * HEAD_DIM
    q = tl.load(q_ptr + q_rows[None, :] + dims[:, None], mask=is_row[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    offsets = tl.arange(0, BLOCK_N)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    if RANK > 0:
        recalled = tl.zeros([MEMBERS * RANK, BLOCK_M], tl.float32)
        first_subgroup = tl.load(entry + 4)
        end_subgroup = tl.load(entry + 5)
        place = tl.arange(0, MEMBERS)
        adapter, owner = owners_of(subgroups_ptr, first_subgroup, end_subgroup, place)
        has_adapter = adapter >= 0
        width = tl.load(rank_class_ptr + adapter, mask=has_adapter, other=0) // 8 * 8
        own_pages = residual_pages_ptr + owner.to(tl.int64) * residual_pages_stride
        if HAS_K:
            of_residuals = scores_ptr + (group * NUM_KV_HEADS + head).to(tl.int64) * num_positions * BLOCK_M + column[None, :]
            if HAS_KEY_SCALE:
                change_column = tl.load(change_column_ptr + adapter, mask=has_adapter, other=-1)
    first_page = first // PAGE_SIZE
    last_page = (run_end - 1) // PAGE_SIZE
    if HAS_K:
        next_scores = tl.load(of_residuals + (start + offsets)[:, None] * BLOCK_M)
    for tile in range(start, end, BLOCK_N):
        at = (
            tile_slots(base_pages, tile, first_page, last_page, offsets, PAGE_SIZE, BLOCK_N)[:, None] * WIDTH
            + (head * HEAD_DIM + dims)[None, :]
        )
        if BLOCK_D == HEAD_DIM:
            k = tl.load(k_ptr + at)
            v = tl.load(v_ptr + at)
        else:
            k = tl.load(k_ptr + at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(v_ptr + at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        if RANK > 0:
            starts = member_starts(
                own_pages, has_adapter, width, tile, first_page, last_page, offsets, PAGE_SIZE, BLOCK_N, MEMBERS, RANK
            )
            a_v = stacked_rows(v_ptr, starts, width, BLOCK_N, MEMBERS, RANK)
        scores = tl.dot(k, q, input_precision=PRECISION)
        if HAS_K:
            if HAS_KEY_SCALE:
                change = key_scales(
                    v_ptr, own_pages, width, change_column, change_column >= 0, tile, first_page, last_page, offsets, 0.0, head,
                    PAGE_SIZE, BLOCK_N, MEMBERS,
                )  # fmt: skip
                scores *= 1.0 + by_columns(change, BLOCK_N, MEMBERS, BLOCK_G)
            scores += next_scores.to(tl.float32)
            next_scores = tl.load(of_residuals + (tl.minimum(tile + BLOCK_N, end - BLOCK_N) + offsets)[:, None] * BLOCK_M)
        if PAGE_SIZE % BLOCK_N != 0:  # else tiles lie in pages, which belong to the run or do not
            positions = tile + offsets
            scores = tl.where(((positions >= first) & (positions < run_end))[:, None], scores, float("-inf"))
        weights, correction, highest, total = softmax_step(scores, scale_log2, highest, total)
        p = weights.to(dtype)
        if RANK > 0:
            recalled = tl.dot(tl.trans(a_v), p, recalled * correction[None, :], input_precision=PRECISION)
        output = tl.dot(tl.trans(v), p, output * correction[None, :], input_precision=PRECISION)

    # Divided first: sums over thousands of keys could leave fp16's range.
    sums = tl.sum(total, axis=0)
    output = output / sums[None, :]
    if RANK > 0:
        output += recalled_values(
            recalled / sums[None, :], b_v_ptr, ranks_ptr, subgroups_ptr, first_subgroup, end_subgroup, member, head, half,
            PRECISION, NUM_KV_HEADS, HEAD_DIM, MEMBERS, RANK, BLOCK_D,
        )  # fmt: skip
    # Read again: addresses made of what was read before the loop would wait for its end in registers, or spill.
    sequence = tl.load(members_ptr + group * MEMBERS + member)
    is_row = (sequence >= 0) & (of_member < GROUP)
    sequence = tl.where(is_row, sequence, 0).to(tl.int64)
    lse_at = lse_ptr + (sequence * NUM_KV_HEADS * GROUP + heads) * out_splits + first_split + split
    out_at = out_ptr + ((sequence * NUM_KV_HEADS * GROUP + heads) * out_splits + first_split + split) * HEAD_DIM
    tl.store(out_at[None, :] + dims[:, None], output, mask=is_row[None, :] & (dims < HEAD_DIM)[:, None])
    tl.store(lse_at, (highest + tl.log2(sums)) * 0.6931471805599453, mask=is_row)


def grouped(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: DecodeRows,
    runs: SharedRuns,
    scale: float,
    partials: Partials,
    num_splits: int,
    residuals: Residuals | None = None,
    basis: RopeBasis | None = None,
    num_positions: int | None = None,
    config: GroupedConfig | None = None,
    scores_config: ScoresConfig | None = None,
) -> None:
    """``basis`` None: no adapter touches k. Configurations override the card's, for tuning."""
    num_heads, head_dim = q.shape[1:]
    group = num_heads // rows.num_kv_heads
    num_groups, members = runs.members.shape
    if num_groups == 0 or num_splits == 0 or len(q) == 0:
        return
    block_g = _block_g(group, members)
    tables: tuple[Tensor | None, ...] = (None,) * 5
    scores = None
    rank = 0
    if residuals is not None:
        rank = residuals.b_v.shape[1]
        tables = (residuals.pages, residuals.b_v, residuals.ranks, residuals.rank_class, residuals.change_column)
        if basis is not None:
            reach = rows.base_pages.shape[1] * rows.page_size if num_positions is None else num_positions
            stride = members * block_g
            scores = residual_scores(q, k_plane, rows, runs, residuals, basis, reach, stride, scores_config)
    is_exact = q.dtype == torch.float32
    config = config or grouped_config(head_dim, members * block_g, q.element_size(), rank)
    grouped_kernel[(rows.num_kv_heads, num_splits, num_groups)](
        q, k_plane, v_plane, rows.base_pages, runs.groups, runs.members, runs.subgroups, *tables, scores, partials.out,
        partials.lse, scale * LOG2_E, q.stride(0), rows.base_pages.stride(0),
        residuals.pages.stride(0) if residuals is not None else 0, partials.num_splits,
        scores.shape[2] if scores is not None else 0, NUM_KV_HEADS=rows.num_kv_heads, PAGE_SIZE=rows.page_size, RANK=rank,
        HAS_K=scores is not None, HAS_KEY_SCALE=residuals is not None and residuals.change_column is not None,
        BLOCK_G=block_g, **_constants(head_dim, group, members, is_exact, config),
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
    )  # fmt: skip


def _block_g(group: int, members: int) -> int:
    """Columns of a member: a warpgroup's product has 16 at least."""
    return max(triton.next_power_of_2(group), 16 // members)


def _constants(head_dim: int, group: int, members: int, is_exact: bool, config: GroupedConfig) -> dict[str, Any]:
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PRECISION": "ieee" if is_exact else "tf32",
        "MEMBERS": members,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }


def aot_variants() -> list[AotVariant]:
    """Llama-3.1-8B: eight agents a group with adapters on k and without, sixteen without adapters; Qwen3 with key scales."""
    return [
        _variant("bf16", 8, 4, 128, 16, 8, {80: 32}),  # blocks are chosen for sm_90: nothing was tuned for sm_80
        _variant("bf16", 8, 4, 128, 0, 16, {80: 8}),
        _variant("bf16", 8, 4, 128, 16, 8, has_k=False),
        _variant("fp16", 8, 4, 128, 16, 8, {80: 168}, has_key_scale=True, page_size=16),
    ]


def _variant(
    dtype: str, num_kv_heads: int, group: int, head_dim: int, rank: int, members: int,
    max_local_bytes: int | dict[int, int] = 0, has_k: bool = True, has_key_scale: bool = False, page_size: int = 64,
) -> AotVariant:  # fmt: skip
    has_k = has_k and rank > 0
    block_g = _block_g(group, members)
    config = grouped_config(head_dim, members * block_g, 2, rank)
    constants = {
        "NUM_KV_HEADS": num_kv_heads, "PAGE_SIZE": page_size, "RANK": rank, "HAS_K": has_k, "HAS_KEY_SCALE": has_key_scale,
        "BLOCK_G": block_g, **_constants(head_dim, group, members, False, config),
    }  # fmt: skip
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "b_v_ptr"), f"*{dtype}") | {"scores_ptr": "*fp16"}
    signature |= dict.fromkeys(("base_pages_ptr", "groups_ptr", "members_ptr", "subgroups_ptr", "residual_pages_ptr"), "*i32")
    signature |= dict.fromkeys(("ranks_ptr", "rank_class_ptr", "change_column_ptr"), "*i32")
    signature |= {"out_ptr": "*fp32", "lse_ptr": "*fp32", "scale_log2": "fp32", "q_stride": "i32:16"}
    signature |= dict.fromkeys(("base_pages_stride", "residual_pages_stride", "out_splits", "num_positions"), "i32")
    absent = [] if has_key_scale else ["change_column_ptr"]
    absent += [] if has_k else ["scores_ptr"]
    absent += [] if rank else ["residual_pages_ptr", "b_v_ptr", "ranks_ptr", "rank_class_ptr"]
    for name in absent:
        del signature[name]
        constants[name] = None
    parts = f"r{rank}_m{members}{'' if has_k else '_no_k'}{'_scaled' if has_key_scale else ''}"
    name = f"grouped_{dtype}_{num_kv_heads}x{group}x{head_dim}_{parts}_p{page_size}"
    return AotVariant(grouped_kernel, signature, constants, config.num_warps, config.num_stages, name, max_local_bytes)
