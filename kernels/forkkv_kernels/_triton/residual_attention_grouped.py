"""Decode rows of agents that share a run of base pages, the run read once for all of them. See ``ops`` for the contract.

A program takes one kv head, one split of a group's run and all rows of the group's members, BLOCK_M = members * g of them,
as columns: S^T = K q^T and O^T = V^T P^T with keys on the long side. For every *adapter* among them (subgroup) and tile it
builds R(a B_k) once and scores it against all columns; a select keeps those of the subgroup. That wastes products, and still
costs less than moving a few columns into place. P a_v likewise; B_v comes once, after the last tile.

Multiply-adds of one kv head and tile of 64 keys at D 128, rank 16, 32 agents of g 4 in groups of 8, adapters all distinct:

    base      S^T and O^T      2 * 64*128*128                                  2.1 M, of which nothing is padding
    K         y = a B_k        32 * 64*16*128                                  4.2 M
              R(y) q^T         32 * 64*128*32, 4 of 32 columns are wanted      8.4 M
    V         P a_v            32 * 64*16*32                                   1.0 M
    rotation  32 * 64*128 elements, two operations each, in packed halves

The other way to the same scores folds B_k into q (``reference.residual_attention``): a product of cos|sin with g * r = 64
columns an adapter, 64*128*64 * 32 = 16.8 M, and a weighted sum over r; it grows with agents times rank, this one does not.
Over 32k keys and 8 kv heads: 129 GFLOP, 0.16 ms at 791 TFLOP/s. Bytes: base pages once, 134 MB, and residuals, 67 MB, from
memory; from L2 base pages once a group and residuals once a kv head, 1.1 GB. Rows in one group cut the former, and cost
columns of R(y) q^T: 8 agents of g 4 are the balance where all adapters differ and touch k, more where none touches k.

What these products cost is not what limits it. A subgroup and tile take a warp 237 instructions for K (64 of them the rotation)
and 79 for P a_v, a tile 1,000 more, which at one instruction a clock and scheduler is 0.28 ms for 32 adapters on an H100; so
addresses, masks and conversions are kept out of the loop over subgroups, and every load in it is made a subgroup or more ahead.

R(y), the query rotated back and B_k are fp16 whatever the KV's dtype: their packed arithmetic halves the rotation, and fp16
keeps 11 bits where bf16 keeps 8. y is one product's sum over r in fp16, all sums over keys or D are fp32. A residual key beyond
65504 would overflow; a base key of that size has no softmax to speak of.
"""

# ruff: noqa: SIM102 (of two ifs one is there for the compiler)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant
from forkkv_kernels._triton.decode_configs import GroupedConfig, grouped_config
from forkkv_kernels._triton.residual_attention_decode import LOG2_E, NO_RESIDUALS
from forkkv_kernels._triton.tiles import (
    load_base,
    load_factor,
    load_factor_halves,
    load_key_scale,
    load_page_ids,
    load_query_halves,
    offset_angles,
    residual_of,
    rotated_back,
    rotated_tile,
    slots_of,
    softmax_step,
)
from forkkv_kernels.reference.combine_partials import Partials
from forkkv_kernels.reference.residual_attention_decode import DecodeRows
from forkkv_kernels.reference.residual_attention_grouped import SharedRuns
from forkkv_kernels.reference.residuals import Residuals as DecodeResiduals


@triton.jit
def rows_of(plane_ptr, pages, positions, rank_class, PAGE_SIZE: tl.constexpr, BLOCK_R: tl.constexpr):
    """Residual rows of positions that are all inside the run: [BLOCK_N, BLOCK_R], garbage from the rank on."""
    columns = tl.arange(0, BLOCK_R)
    width = (rank_class // 8) * 8  # says to the compiler that rows are aligned
    pointers = plane_ptr + slots_of(pages, positions, PAGE_SIZE)[:, None] * width + columns[None, :]
    return tl.load(pointers, mask=(columns < width)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def open_subgroups(
    plane_ptr, subgroups_ptr, first, last, residual_pages_ptr, residual_pages_stride, rank_class_ptr, positions,
    PAGE_SIZE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile's residual rows of the first subgroup, and what leads to those of the next two.

    Rows lie behind three loads that wait for each other (subgroup, page table and class, rows): each is made one subgroup
    before the next, so that none is waited for. -> (rows, their pages, adapter, class; pages, adapter, class of the second;
    adapter and owner of the third). Beyond ``last`` it is ``last`` again. ``positions`` are all inside the run.
    """
    second = subgroups_ptr + tl.minimum(first + 1, last) * 4
    third = subgroups_ptr + tl.minimum(first + 2, last) * 4
    adapter = tl.load(subgroups_ptr + first * 4)
    adapter1 = tl.load(second)
    row = tl.load(subgroups_ptr + first * 4 + 3).to(tl.int64)
    row1 = tl.load(second + 3).to(tl.int64)
    rank_class = tl.load(rank_class_ptr + adapter)
    class1 = tl.load(rank_class_ptr + adapter1)
    pages = tl.load(residual_pages_ptr + row * residual_pages_stride + positions // PAGE_SIZE)
    pages1 = tl.load(residual_pages_ptr + row1 * residual_pages_stride + positions // PAGE_SIZE)
    rows = rows_of(plane_ptr, pages, positions, rank_class, PAGE_SIZE, BLOCK_R)
    return rows, pages, adapter, rank_class, pages1, adapter1, class1, tl.load(third), tl.load(third + 3)


@triton.jit
def next_subgroups(
    plane_ptr, subgroups_ptr, subgroup, last, residual_pages_ptr, residual_pages_stride, rank_class_ptr, positions,
    pages1, adapter1, class1, adapter2, row2, PAGE_SIZE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same for the one after ``subgroup``."""
    rows = rows_of(plane_ptr, pages1, positions, class1, PAGE_SIZE, BLOCK_R)
    owner = residual_pages_ptr + row2.to(tl.int64) * residual_pages_stride
    pages2 = tl.load(owner + positions // PAGE_SIZE)
    class2 = tl.load(rank_class_ptr + adapter2)
    third = subgroups_ptr + tl.minimum(subgroup + 3, last) * 4
    return rows, pages1, adapter1, class1, pages2, adapter2, class2, tl.load(third), tl.load(third + 3)


@triton.jit(do_not_specialize=["num_positions", "base_pages_stride", "residual_pages_stride", "out_splits"])
def grouped_kernel(
    q_ptr, q_half_ptr, k_ptr, v_ptr, base_pages_ptr, groups_ptr, members_ptr, subgroups_ptr, residual_pages_ptr,
    b_k_ptr, b_v_ptr, ranks_ptr, rank_class_ptr, norm_column_ptr, change_column_ptr, cos_sin_ptr, out_ptr, lse_ptr,
    scale_log2, num_positions, q_stride, base_pages_stride, residual_pages_stride, out_splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, RANK: tl.constexpr,
    HAS_K: tl.constexpr, HAS_KEY_SCALE: tl.constexpr, PRECISION: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
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
    first = tl.load(entry)
    run_end = first + tl.load(entry + 1)
    first_split = tl.load(entry + 3)
    num_tiles = tl.cdiv(run_end - first, BLOCK_N)
    start = first + num_tiles * split // num_splits * BLOCK_N
    end = tl.minimum(first + num_tiles * (split + 1) // num_splits * BLOCK_N, run_end)

    column = tl.arange(0, BLOCK_M)
    member = column // BLOCK_G
    sequence = tl.load(members_ptr + group * MEMBERS + member)
    is_row = (sequence >= 0) & (column % BLOCK_G < GROUP)
    sequence = tl.where(is_row, sequence, 0).to(tl.int64)
    heads = head * GROUP + column % BLOCK_G
    lse_at = lse_ptr + (sequence * NUM_KV_HEADS * GROUP + heads) * out_splits + first_split + split
    if start >= end:
        if run_end > first:
            tl.store(lse_at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=is_row)
        return

    base_pages = base_pages_ptr + tl.load(entry + 2).to(tl.int64) * base_pages_stride
    dims = tl.arange(0, BLOCK_D)
    q_rows = sequence * q_stride + heads * HEAD_DIM
    half_rows = (sequence * NUM_KV_HEADS * GROUP + heads) * HEAD_DIM
    q = tl.load(q_ptr + q_rows[None, :] + dims[:, None], mask=is_row[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    offsets = tl.arange(0, BLOCK_N)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    if RANK > 0:
        BLOCK_R: tl.constexpr = RANK
        first_subgroup = tl.load(entry + 4)
        end_subgroup = tl.load(entry + 5)
        recalled = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        if HAS_K:
            cos, sin = offset_angles(cos_sin_ptr, num_positions, HEAD_DIM, BLOCK_N, BLOCK_H)
            cos = cos.to(half)
            sin = sin.to(half)

    pages = load_page_ids(base_pages, start + offsets, start + offsets < end, PAGE_SIZE)
    for tile in range(start, end, BLOCK_N):
        positions = tile + offsets
        mask = positions < end
        inside = tl.minimum(positions, end - 1)
        slots = slots_of(pages, positions, PAGE_SIZE)
        k = load_base(k_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_D)
        v = load_base(v_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_D)
        pages = load_page_ids(base_pages, positions + BLOCK_N, positions + BLOCK_N < end, PAGE_SIZE)
        scores = tl.dot(k, q, input_precision=PRECISION)
        if HAS_K:
            # An ``if`` around the loop over subgroups, besides: with it the compiler pipelines the loads of K and V in the loop
            # over tiles; where a loop stands in that one directly, it does not.
            if first_subgroup < end_subgroup:
                rows, row_pages, adapter, rank_class, pages1, adapter1, class1, adapter2, row2 = open_subgroups(
                    k_ptr, subgroups_ptr, first_subgroup, end_subgroup - 1, residual_pages_ptr, residual_pages_stride,
                    rank_class_ptr, inside, PAGE_SIZE, BLOCK_R,
                )  # fmt: skip
                own, crossed = load_query_halves(q_half_ptr, half_rows, is_row, HEAD_DIM, BLOCK_H)
                back = rotated_back(own, crossed, cos_sin_ptr, tile, HEAD_DIM, BLOCK_H)
                b = load_factor_halves(b_k_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, BLOCK_R, BLOCK_H).to(half)
                for subgroup in tl.range(first_subgroup, end_subgroup, num_stages=1):
                    own_adapter = adapter
                    own_pages = row_pages
                    own_class = rank_class
                    rank = tl.load(ranks_ptr + 2 * own_adapter)
                    member_first = tl.load(subgroups_ptr + subgroup * 4 + 1)
                    member_end = tl.load(subgroups_ptr + subgroup * 4 + 2)
                    is_own = (member >= member_first) & (member < member_end)
                    a_k = residual_of(rows, rank, BLOCK_R)
                    rows, row_pages, adapter, rank_class, pages1, adapter1, class1, adapter2, row2 = next_subgroups(
                        k_ptr, subgroups_ptr, subgroup, end_subgroup - 1, residual_pages_ptr, residual_pages_stride,
                        rank_class_ptr, inside, pages1, adapter1, class1, adapter2, row2, PAGE_SIZE, BLOCK_R,
                    )  # fmt: skip
                    y = tl.dot(a_k.to(half), b, input_precision=PRECISION, out_dtype=half)
                    b = load_factor_halves(b_k_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, BLOCK_R, BLOCK_H).to(half)
                    added = tl.dot(rotated_tile(y, cos, sin, BLOCK_N, BLOCK_H), back, input_precision=PRECISION)
                    if HAS_KEY_SCALE:
                        own_slots = slots_of(own_pages, inside, PAGE_SIZE)
                        norm_column = tl.load(norm_column_ptr + own_adapter)
                        is_scaled = mask & (norm_column >= 0)
                        norm = load_key_scale(k_ptr, own_slots, is_scaled, own_class, norm_column + head)
                        change_column = tl.load(change_column_ptr + own_adapter)
                        change = load_key_scale(v_ptr, own_slots, is_scaled, own_class, change_column + head)
                        norm = tl.where(norm_column >= 0, norm, 1.0)
                        changed = scores * (1.0 + change)[:, None] + added * norm[:, None]
                        scores = tl.where(is_own[None, :], changed, scores)
                    else:
                        scores += tl.where(is_own[None, :], added, 0.0)

        scores = tl.where(mask[:, None], scores, float("-inf"))
        weights, correction, highest, total = softmax_step(scores, scale_log2, highest, total)
        p = weights.to(dtype)
        if RANK > 0:
            recalled *= correction[None, :]
            if first_subgroup < end_subgroup:
                rows, row_pages, adapter, rank_class, pages1, adapter1, class1, adapter2, row2 = open_subgroups(
                    v_ptr, subgroups_ptr, first_subgroup, end_subgroup - 1, residual_pages_ptr, residual_pages_stride,
                    rank_class_ptr, inside, PAGE_SIZE, BLOCK_R,
                )  # fmt: skip
                for subgroup in tl.range(first_subgroup, end_subgroup, num_stages=1):
                    member_first = tl.load(subgroups_ptr + subgroup * 4 + 1)
                    member_end = tl.load(subgroups_ptr + subgroup * 4 + 2)
                    is_own = (member >= member_first) & (member < member_end)
                    a_v = rows  # what lies beyond the rank stays in rows of its own, which are dropped at the end
                    rows, row_pages, adapter, rank_class, pages1, adapter1, class1, adapter2, row2 = next_subgroups(
                        v_ptr, subgroups_ptr, subgroup, end_subgroup - 1, residual_pages_ptr, residual_pages_stride,
                        rank_class_ptr, inside, pages1, adapter1, class1, adapter2, row2, PAGE_SIZE, BLOCK_R,
                    )  # fmt: skip
                    recalled += tl.where(is_own[None, :], tl.dot(tl.trans(a_v), p, input_precision=PRECISION), 0.0)
        output = tl.dot(tl.trans(v), p, output * correction[None, :], input_precision=PRECISION)

    if RANK > 0:
        for subgroup in tl.range(first_subgroup, end_subgroup, num_stages=1):
            adapter = tl.load(subgroups_ptr + subgroup * 4)
            member_first = tl.load(subgroups_ptr + subgroup * 4 + 1)
            member_end = tl.load(subgroups_ptr + subgroup * 4 + 2)
            is_own = (member >= member_first) & (member < member_end)
            b_v = load_factor(b_v_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, BLOCK_R, BLOCK_D)
            is_ranked = tl.arange(0, BLOCK_R) < tl.load(ranks_ptr + 2 * adapter + 1)
            own = tl.where(is_ranked[:, None] & is_own[None, :], recalled, 0.0)
            output = tl.dot(tl.trans(b_v).to(tl.float32), own, output, input_precision=PRECISION)

    sums = tl.sum(total, axis=0)
    # Read again: addresses made of what was read before the loop would wait for its end in registers, or spill.
    sequence = tl.load(members_ptr + group * MEMBERS + member)
    is_row = (sequence >= 0) & (column % BLOCK_G < GROUP)
    sequence = tl.where(is_row, sequence, 0).to(tl.int64)
    lse_at = lse_ptr + (sequence * NUM_KV_HEADS * GROUP + heads) * out_splits + first_split + split
    out_at = out_ptr + ((sequence * NUM_KV_HEADS * GROUP + heads) * out_splits + first_split + split) * HEAD_DIM
    tl.store(out_at[None, :] + dims[:, None], output / sums[None, :], mask=is_row[None, :] & (dims < HEAD_DIM)[:, None])
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
    residuals: DecodeResiduals | None,
    has_k: bool = True,
    config: GroupedConfig | None = None,
) -> None:
    """``config`` overrides the card's, for tuning."""
    num_heads, head_dim = q.shape[1:]
    group = num_heads // rows.num_kv_heads
    num_groups, members = runs.members.shape
    rank = residuals.b_k.shape[1] if residuals is not None else 0
    columns = members * _block_g(group, members)
    config = config or grouped_config(head_dim, columns, q.element_size(), rank, has_k)
    if num_groups == 0 or num_splits == 0 or len(q) == 0:
        return
    tables: tuple[Tensor | None, ...] = (None,) * 8
    if residuals is not None:
        tables = (
            residuals.pages, residuals.b_k, residuals.b_v, residuals.ranks, residuals.rank_class, residuals.norm_column,
            residuals.change_column, residuals.cos_sin,
        )  # fmt: skip
    is_exact = q.dtype == torch.float32
    q_half = q.contiguous() if is_exact else q
    if has_k and rank > 0 and not is_exact:  # a conversion here, not one a tile
        q_half = q.half().contiguous()
    grouped_kernel[(rows.num_kv_heads, num_splits, num_groups)](
        q, q_half, k_plane, v_plane, rows.base_pages, runs.groups, runs.members, runs.subgroups, *tables, partials.out,
        partials.lse, scale * LOG2_E, len(residuals.cos_sin) if residuals is not None else 0, q.stride(0),
        rows.base_pages.stride(0), residuals.pages.stride(0) if residuals is not None else 0, partials.num_splits,
        NUM_KV_HEADS=rows.num_kv_heads, PAGE_SIZE=rows.page_size, RANK=rank, HAS_K=has_k and rank > 0,
        HAS_KEY_SCALE=residuals is not None and residuals.norm_column is not None,
        **_constants(head_dim, group, members, is_exact, config),
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
        "BLOCK_G": _block_g(group, members),
        "BLOCK_N": config.block_n,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_H": triton.next_power_of_2(head_dim // 2),
    }


def aot_variants() -> list[AotVariant]:
    """Llama-3.1-8B: eight agents a group with adapters on k, sixteen without, none; Qwen3 with key scales."""
    return [
        _variant("bf16", 8, 4, 128, 16, 8, {80: 448}),  # blocks are chosen for sm_90: nothing was tuned for sm_80
        _variant("bf16", 8, 4, 128, 16, 16, {80: 176}, has_k=False),
        _variant("bf16", 8, 4, 128, 0, 16),
        _variant("fp16", 8, 4, 128, 16, 8, {80: 520}, has_key_scale=True),
    ]


def _variant(
    dtype: str, num_kv_heads: int, group: int, head_dim: int, rank: int, members: int,
    max_local_bytes: int | dict[int, int] = 0, has_k: bool = True, has_key_scale: bool = False, page_size: int = 16,
) -> AotVariant:  # fmt: skip
    has_k = has_k and rank > 0
    config = grouped_config(head_dim, members * _block_g(group, members), 2, rank, has_k)
    constants = {
        "NUM_KV_HEADS": num_kv_heads, "PAGE_SIZE": page_size, "RANK": rank, "HAS_K": has_k, "HAS_KEY_SCALE": has_key_scale,
        **_constants(head_dim, group, members, False, config),
    }  # fmt: skip
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "b_k_ptr", "b_v_ptr"), f"*{dtype}")
    signature["q_half_ptr"] = "*fp16" if has_k else f"*{dtype}"
    signature |= dict.fromkeys(("base_pages_ptr", "groups_ptr", "members_ptr", "subgroups_ptr", "residual_pages_ptr"), "*i32")
    signature |= dict.fromkeys(("ranks_ptr", "rank_class_ptr", "norm_column_ptr", "change_column_ptr"), "*i32")
    signature |= dict.fromkeys(("cos_sin_ptr", "out_ptr", "lse_ptr"), "*fp32") | {"scale_log2": "fp32"}
    signature |= dict.fromkeys(("num_positions", "base_pages_stride", "residual_pages_stride"), "i32")
    signature |= {"q_stride": "i32:16", "out_splits": "i32"}
    for name in NO_RESIDUALS if rank == 0 else () if has_key_scale else ("norm_column_ptr", "change_column_ptr"):
        if name in signature:
            del signature[name]
            constants[name] = None
    parts = f"r{rank}_m{members}{'' if has_k else '_no_k'}{'_scaled' if has_key_scale else ''}"
    name = f"grouped_{dtype}_{num_kv_heads}x{group}x{head_dim}_{parts}"
    return AotVariant(grouped_kernel, signature, constants, config.num_warps, config.num_stages, name, max_local_bytes)
