"""Scores of residual keys, for all members of a group that shares a run: B_k folded into the queries.

A residual's score is linear in the residual. With b_r the halves (b1, b2) of row r of B_k and (q1, q2) those of a query head,

    q . R_j(a B_k) = sum_r a_r G_jr       G_jr = sum_f cos(j f) (q1 b1 + q2 b2)_f + sin(j f) (q2 b1 - q1 b2)_f

so that one product of a position's cosines and sines with a matrix that is the same for all keys (``fold_kernel``) gives G, and
a sum over r with the residual as weights the score. No key is rebuilt, nothing is rotated, no column belongs to two adapters.
Of the cosines and sines only the fast ones are multiplied as they are; for the slow ones G comes from 16 functions of the place
in a chunk of 512 keys (``reference.rope_basis``), whose coefficients ``chunk_kernel`` works out once a chunk: for Llama-3.1 an
element of G costs 48 products, not 128.

Multiply-adds of one kv head and tile of 64 keys at D 128, rank 16, 32 agents of g 4, whatever their adapters: 64*48*64 * 32 =
6.3 M for G, 16*128*64 * 32 / 8 tiles = 0.5 M for chunks; over 32k keys and 8 kv heads 56 GFLOP. Rebuilding K costs 4.2 M for
B_k of 32 adapters and 2.1 M for the scores that are wanted, but those as products of 4 columns that take the time of 16, with a
rotation between: 32 adapters took 0.77 ms on an H100 when it was done so, and take 0.41.

Columns of G run over (head, r / 2, member, r % 2): a thread that holds an element has all r of its member and head, and the sum
over r moves nothing. Scores are kept in fp16, 11 bits where a bf16 key has 8.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant
from forkkv_kernels._triton.decode_configs import ScoresConfig, scores_config
from forkkv_kernels._triton.member_tiles import by_members, key_scales, member_starts, owners_of, stacked_rows
from forkkv_kernels.reference.residual_attention_decode import DecodeRows
from forkkv_kernels.reference.residual_attention_grouped import SharedRuns
from forkkv_kernels.reference.residuals import Residuals
from forkkv_kernels.reference.rope_basis import BASIS, CHUNK, RopeBasis, padded_half


@triton.jit
def fold_kernel(
    q_ptr, b_k_ptr, groups_ptr, members_ptr, subgroups_ptr, folded_ptr, q_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """B_k of one member and kv head folded into its queries: its columns of folded [blocks, Hkv, 2 * BLOCK_H, COLUMNS]."""
    head = tl.program_id(0)
    place = tl.program_id(1)
    group = place // MEMBERS
    member = place % MEMBERS
    entry = groups_ptr + group * 6
    if tl.load(entry + 1) == 0:
        return
    adapter, _ = owners_of(subgroups_ptr, tl.load(entry + 4), tl.load(entry + 5), member)
    sequence = tl.load(members_ptr + place)
    HALF: tl.constexpr = HEAD_DIM // 2
    COLUMNS: tl.constexpr = BLOCK * HEADS * RANK
    row = tl.arange(0, 2 * BLOCK_H)
    frequency = row % BLOCK_H
    is_sin = (row // BLOCK_H == 1)[:, None]
    r = tl.arange(0, RANK)
    b_at = b_k_ptr + ((tl.maximum(adapter, 0).to(tl.int64) * RANK + r) * NUM_KV_HEADS + head)[None, :] * HEAD_DIM
    b_mask = (frequency < HALF)[:, None] & (adapter >= 0)
    b1 = tl.load(b_at + frequency[:, None], mask=b_mask, other=0.0).to(tl.float32)
    b2 = tl.load(b_at + HALF + frequency[:, None], mask=b_mask, other=0.0).to(tl.float32)
    of_q1 = tl.where(is_sin, -b2, b1)
    of_q2 = tl.where(is_sin, b1, b2)
    columns = (r // 2 * BLOCK + place % BLOCK) * 2 + r % 2
    out = folded_ptr + (place // BLOCK * NUM_KV_HEADS + head).to(tl.int64) * (2 * BLOCK_H * COLUMNS) + row[:, None] * COLUMNS
    for i in tl.static_range(HEADS):
        q_at = q_ptr + tl.maximum(sequence, 0).to(tl.int64) * q_stride + (head * GROUP + i) * HEAD_DIM + frequency
        q_mask = (frequency < HALF) & (sequence >= 0) & (i < GROUP)
        q1 = tl.load(q_at, mask=q_mask, other=0.0).to(tl.float32)
        q2 = tl.load(q_at + HALF, mask=q_mask, other=0.0).to(tl.float32)
        folded = q1[:, None] * of_q1 + q2[:, None] * of_q2
        tl.store(out + (i * BLOCK * RANK + columns)[None, :], folded.to(folded_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_chunks"])
def chunk_kernel(
    coefficients_ptr, folded_ptr, groups_ptr, chunks_ptr, num_chunks, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BASIS: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """chunks [blocks, Hkv, num_chunks, BASIS, COLUMNS] := coefficients [num_chunks * BASIS, BLOCK_K] @ folded [blocks, Hkv,
    BLOCK_K, COLUMNS], of the chunks that a group's run reaches."""
    head = tl.program_id(2)
    block = tl.program_id(1)
    group = block // BLOCKS
    first_row = tl.program_id(0) // (COLUMNS // BLOCK_C) * BLOCK_M
    columns = tl.program_id(0) % (COLUMNS // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.load(groups_ptr + group * 6)
    tokens = tl.load(groups_ptr + group * 6 + 1)
    begin = first // CHUNK * BASIS
    end = tl.where(tokens > 0, ((first + tokens - 1) // CHUNK + 1) * BASIS, 0)
    if (first_row >= end) | (first_row + BLOCK_M <= begin):
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    is_row = rows < tl.minimum(end, num_chunks * BASIS)
    pair = (block * tl.num_programs(2) + head).to(tl.int64)
    coefficients = tl.load(coefficients_ptr + rows[:, None] * BLOCK_K + k[None, :], mask=is_row[:, None], other=0.0)
    folded = tl.load(folded_ptr + pair * (BLOCK_K * COLUMNS) + k[:, None] * COLUMNS + columns[None, :])
    found = tl.dot(coefficients, folded, input_precision=PRECISION)
    out = chunks_ptr + (pair * num_chunks * BASIS + rows)[:, None] * COLUMNS + columns[None, :]
    tl.store(out, found.to(chunks_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def summed_over_rank(g, a, BLOCK_N: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_G: tl.constexpr, RANK: tl.constexpr):
    """g [BLOCK_N, BLOCK_G * RANK * MEMBERS], a [BLOCK_N, MEMBERS * RANK] fp32 -> [BLOCK_N, BLOCK_G * MEMBERS] in the order of
    scores."""
    parts = tl.permute(tl.reshape(g, (BLOCK_N, BLOCK_G, RANK // 2, MEMBERS, 2)), (0, 3, 1, 2, 4))
    parts = tl.reshape(parts, (BLOCK_N, MEMBERS, BLOCK_G, RANK))
    found = tl.sum(parts * tl.expand_dims(tl.reshape(a, (BLOCK_N, MEMBERS, RANK)), 2), axis=3)
    if BLOCK_G > 1:
        found = tl.permute(tl.reshape(found, (BLOCK_N, MEMBERS, BLOCK_G // 2, 2)), (0, 2, 1, 3))
    return tl.reshape(found, (BLOCK_N, MEMBERS * BLOCK_G))


@triton.jit(do_not_specialize=["residual_pages_stride", "num_chunks", "num_positions"])
def scores_kernel(
    k_ptr, groups_ptr, subgroups_ptr, residual_pages_ptr, ranks_ptr, rank_class_ptr, norm_column_ptr, features_ptr, folded_ptr,
    chunks_ptr, scores_ptr, residual_pages_stride, num_chunks, num_positions,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, RANK: tl.constexpr, HAS_KEY_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, NEAR: tl.constexpr, CHUNK: tl.constexpr, BASIS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """scores [G, Hkv, num_positions, STRIDE] of BLOCK members a program; STRIDE is MEMBERS times at least HEADS."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    block = tl.program_id(2)
    num_splits = tl.num_programs(1)
    group = block // (MEMBERS // BLOCK)
    COLUMNS: tl.constexpr = BLOCK * HEADS * RANK
    entry = groups_ptr + group * 6
    num_tokens = tl.load(entry + 1)
    if num_tokens == 0:
        return
    first = tl.load(entry)
    run_end = first + num_tokens
    first_tile = first // BLOCK_N
    num_tiles = tl.cdiv(run_end, BLOCK_N) - first_tile
    start = (first_tile + num_tiles * split // num_splits) * BLOCK_N
    end = (first_tile + num_tiles * (split + 1) // num_splits) * BLOCK_N
    if start >= end:
        return
    first_page = first // PAGE_SIZE
    last_page = (run_end - 1) // PAGE_SIZE
    place = block % (MEMBERS // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    adapter, owner = owners_of(subgroups_ptr, tl.load(entry + 4), tl.load(entry + 5), place)
    has_adapter = adapter >= 0
    width = tl.load(rank_class_ptr + adapter, mask=has_adapter, other=0) // 8 * 8
    rank_k = tl.load(ranks_ptr + 2 * adapter, mask=has_adapter, other=0)
    ranked = (tl.arange(0, BLOCK * RANK) % RANK)[None, :] < by_members(rank_k[None, :], 1, BLOCK, RANK)
    own_pages = residual_pages_ptr + owner.to(tl.int64) * residual_pages_stride
    if HAS_KEY_SCALE:
        norm_column = tl.load(norm_column_ptr + adapter, mask=has_adapter, other=-1)

    pair = (block * NUM_KV_HEADS + head).to(tl.int64)
    # In two parts, of half the heads each, G takes half the registers, and another program fits beside.
    PART: tl.constexpr = COLUMNS // PARTS
    columns = tl.arange(0, PART)
    fast = tl.arange(0, NEAR)
    basis = tl.arange(0, BASIS)
    fast_row = fast % (NEAR // 2) + fast // (NEAR // 2) * BLOCK_H
    near_at = folded_ptr + (pair * (2 * BLOCK_H) + fast_row)[:, None] * COLUMNS + columns[None, :]
    near = tl.load(near_at)
    if PARTS == 2:
        near2 = tl.load(near_at + PART)
    chunks = chunks_ptr + pair * num_chunks * (BASIS * COLUMNS) + basis[:, None] * COLUMNS + columns[None, :]
    offsets = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK * HEADS // PARTS)
    first_member = block % (MEMBERS // BLOCK) * BLOCK
    if HEADS > 1:
        of_scores = (column // (2 * BLOCK) * MEMBERS + first_member + column // 2 % BLOCK) * 2 + column % 2
    elif STRIDE > MEMBERS:  # padded heads beside the one
        of_scores = (first_member + column) * 2
    else:
        of_scores = first_member + column
    out = scores_ptr + (group * NUM_KV_HEADS + head).to(tl.int64) * num_positions * STRIDE + of_scores[None, :]
    # Rows that meet no product are in no ring of the compiler's: they are read a tile ahead.
    starts = member_starts(
        own_pages, has_adapter, width, start, first_page, last_page, offsets, PAGE_SIZE, BLOCK_N, BLOCK, RANK
    )
    next_a_k = stacked_rows(k_ptr, starts, width, BLOCK_N, BLOCK, RANK)
    for tile in range(start, end, BLOCK_N):
        a_k = next_a_k
        ahead = member_starts(
            own_pages, has_adapter, width, tile + BLOCK_N, first_page, last_page, offsets, PAGE_SIZE, BLOCK_N, BLOCK, RANK
        )
        next_a_k = stacked_rows(k_ptr, ahead, width, BLOCK_N, BLOCK, RANK)
        row = features_ptr + (tile + offsets)[:, None] * (NEAR + BASIS)
        now = tl.load(row + fast[None, :])
        within = tl.load(row + NEAR + basis[None, :])
        a = tl.where(ranked, a_k, 0.0).to(tl.float32)
        if HAS_KEY_SCALE:
            norm = key_scales(
                k_ptr, own_pages, width, norm_column, norm_column >= 0, tile, first_page, last_page, offsets, 1.0, head,
                PAGE_SIZE, BLOCK_N, BLOCK,
            )  # fmt: skip
            a *= by_members(norm, BLOCK_N, BLOCK, RANK)
        far_at = chunks + tile // CHUNK * (BASIS * COLUMNS)
        out_at = out + (tile + offsets)[:, None] * STRIDE
        g = tl.dot(now, near, input_precision=PRECISION)
        g = tl.dot(within, tl.load(far_at), g, input_precision=PRECISION)
        tl.store(out_at, summed_over_rank(g, a, BLOCK_N, BLOCK, HEADS // PARTS, RANK).to(scores_ptr.dtype.element_ty))
        if PARTS == 2:
            g = tl.dot(now, near2, input_precision=PRECISION)
            g = tl.dot(within, tl.load(far_at + PART), g, input_precision=PRECISION)
            found = summed_over_rank(g, a, BLOCK_N, BLOCK, HEADS // PARTS, RANK)
            tl.store(out_at + MEMBERS * HEADS // 2, found.to(scores_ptr.dtype.element_ty))


def residual_scores(
    q: Tensor, k_plane: Tensor, rows: DecodeRows, runs: SharedRuns, residuals: Residuals, basis: RopeBasis,
    num_positions: int, stride: int, config: ScoresConfig | None = None,
) -> Tensor:  # fmt: skip
    """[G, Hkv, positions, stride], of all groups at the positions of their runs, in fp16 (fp32 for fp32 KV). num_positions: no
    run reaches further. stride: columns of a group's row, members times at least g. ``config`` overrides the card's, for
    tuning."""
    num_groups, members = runs.members.shape
    num_kv_heads, rank, head_dim = rows.num_kv_heads, residuals.b_k.shape[1], q.shape[2]
    group = q.shape[1] // num_kv_heads
    config = config or scores_config(q.element_size())
    heads = triton.next_power_of_2(group)
    block = max(1, min(members, config.columns // (heads * rank)))
    blocks, columns, half = members // block, block * heads * rank, padded_half(head_dim)
    num_chunks = min(len(basis.coefficients) // BASIS, triton.cdiv(num_positions, CHUNK))
    dtype, precision = basis.features.dtype, "ieee" if q.dtype == torch.float32 else "tf32"
    folded = q.new_empty(num_groups * blocks, num_kv_heads, 2 * half, columns, dtype=dtype)
    chunks = q.new_empty(num_groups * blocks, num_kv_heads, num_chunks, BASIS, columns, dtype=dtype)
    scores = q.new_empty(num_groups, num_kv_heads, num_chunks * CHUNK, stride, dtype=dtype)
    shape = {"NUM_KV_HEADS": num_kv_heads, "RANK": rank, "MEMBERS": members, "BLOCK": block, "HEADS": heads, "BLOCK_H": half}
    fold_kernel[(num_kv_heads, num_groups * members)](
        q, residuals.b_k, runs.groups, runs.members, runs.subgroups, folded, q.stride(0), GROUP=group, HEAD_DIM=head_dim,
        **shape, num_warps=4,
    )  # fmt: skip
    block_c = min(columns, 128)
    programs = triton.cdiv(num_chunks * BASIS, CHUNK_ROWS) * (columns // block_c)
    chunk_kernel[(programs, num_groups * blocks, num_kv_heads)](
        basis.coefficients, folded, runs.groups, chunks, num_chunks, PRECISION=precision, CHUNK=CHUNK, BASIS=BASIS,
        BLOCK_K=2 * half, COLUMNS=columns, BLOCK_C=block_c, BLOCK_M=CHUNK_ROWS, BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    splits = max(1, config.programs // (num_groups * blocks * num_kv_heads))
    scores_kernel[(num_kv_heads, splits, num_groups * blocks)](
        k_plane, runs.groups, runs.subgroups, residuals.pages, residuals.ranks, residuals.rank_class, residuals.norm_column,
        basis.features, folded, chunks, scores, residuals.pages.stride(0), num_chunks, scores.shape[2],
        PAGE_SIZE=rows.page_size, HAS_KEY_SCALE=residuals.norm_column is not None, PRECISION=precision, STRIDE=stride,
        BLOCK_N=config.block_n,
        NEAR=basis.near, CHUNK=CHUNK, BASIS=BASIS, PARTS=_parts(heads), **shape, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return scores


CHUNK_ROWS = 64
"""Four chunks a program of ``chunk_kernel``: the rows of a warpgroup's product."""


def _parts(heads: int) -> int:
    """Of columns of scores, two heads are neighbours: a part has two at least."""
    return 2 if heads >= 4 else 1


def aot_variants() -> list[AotVariant]:
    """Llama-3.1-8B, eight agents a group; Qwen3 with key scales; and what runs before."""
    return [
        _scores_variant("bf16"),
        _fold_variant("bf16"),
        _chunk_variant(),
        _scores_variant("bf16", page_size=16),
        _scores_variant("fp16", has_key_scale=True, max_local_bytes={80: 24}),  # blocks are chosen for sm_90
    ]


_LLAMA = {"NUM_KV_HEADS": 8, "RANK": 16, "MEMBERS": 8, "BLOCK": 4, "HEADS": 4, "BLOCK_H": 64}
_TABLES = dict.fromkeys(("groups_ptr", "subgroups_ptr"), "*i32")


def _scores_variant(
    dtype: str, page_size: int = 64, has_key_scale: bool = False, max_local_bytes: int | dict[int, int] = 0
) -> AotVariant:
    config = scores_config(2)
    constants: dict[str, Any] = {
        "PAGE_SIZE": page_size, "HAS_KEY_SCALE": has_key_scale, "PRECISION": "tf32", "STRIDE": 32, "BLOCK_N": config.block_n,
        "NEAR": 32, "CHUNK": CHUNK, "BASIS": BASIS, "PARTS": 2, **_LLAMA,
    }  # fmt: skip
    tables = ("residual_pages_ptr", "ranks_ptr", "rank_class_ptr", *(("norm_column_ptr",) if has_key_scale else ()))
    signature = {"k_ptr": f"*{dtype}", **_TABLES, **dict.fromkeys(tables, "*i32")}
    signature |= dict.fromkeys(("features_ptr", "folded_ptr", "chunks_ptr", "scores_ptr"), "*fp16")
    signature |= dict.fromkeys(("residual_pages_stride", "num_chunks", "num_positions"), "i32")
    if not has_key_scale:
        constants["norm_column_ptr"] = None
    name = f"residual_scores_{dtype}_8x4x128_r16_p{page_size}{'_scaled' if has_key_scale else ''}"
    return AotVariant(scores_kernel, signature, constants, config.num_warps, config.num_stages, name, max_local_bytes)


def _fold_variant(dtype: str) -> AotVariant:
    signature = {"q_ptr": f"*{dtype}", "b_k_ptr": "*fp16", **_TABLES, "members_ptr": "*i32", "folded_ptr": "*fp16"}
    constants = {"GROUP": 4, "HEAD_DIM": 128, **_LLAMA}
    return AotVariant(fold_kernel, signature | {"q_stride": "i32:16"}, constants, 4, 3, f"fold_{dtype}_8x4x128_r16")


def _chunk_variant() -> AotVariant:
    signature = {"coefficients_ptr": "*fp16", "folded_ptr": "*fp16", "groups_ptr": "*i32", "chunks_ptr": "*fp16"}
    constants = {
        "PRECISION": "tf32", "CHUNK": CHUNK, "BASIS": BASIS, "BLOCK_K": 128, "COLUMNS": 256, "BLOCK_C": 128,
        "BLOCK_M": CHUNK_ROWS, "BLOCKS": 2,
    }  # fmt: skip
    return AotVariant(chunk_kernel, signature | {"num_chunks": "i32"}, constants, 4, 3, "chunk_fp16_128x256")
