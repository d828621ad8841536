"""x A_k and x A_v to their slots, and beside them what rescales K under QK-norm: one program for a tile of entries, or for a
tile and a kv head where there is a scale to compute."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant
from forkkv_kernels._triton.lora_tiles import precision_of, summed
from forkkv_kernels.reference.lora_tiles import LoraTiles
from forkkv_kernels.reference.store_residuals import KeyScaleTables, ResidualTables

_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_entries"])
def _store_residuals_kernel(
    shrunk_ptr, num_columns, num_entries, tiles_ptr, rows_ptr, slots_ptr, ranks_ptr, ranks_stride, widths_ptr,
    k_plane_ptr, v_plane_ptr, k_ptr, k_stride, b_ptr, b_stride, b_row_stride, norm_columns_ptr, change_columns_ptr, head_dim,
    eps, NUM_SPLITS: tl.constexpr, R: tl.constexpr, HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    count = tl.load(tiles_ptr + 3 * tile + 2)
    members = tl.arange(0, BLOCK_M)
    entries = (first + members).to(tl.int64)
    is_member = (members < count) & (adapter >= 0)
    slots = tl.load(slots_ptr + entries, mask=is_member, other=-1).to(tl.int64)
    is_kept = (slots >= 0)[:, None]
    width = tl.load(widths_ptr + adapter, mask=adapter >= 0, other=0)
    k_rank = tl.load(ranks_ptr + adapter * ranks_stride, mask=adapter >= 0, other=0)
    v_rank = tl.load(ranks_ptr + adapter * ranks_stride + 1, mask=adapter >= 0, other=0)
    # k and v are the last two modules of the shrink.
    sums_ptr = shrunk_ptr + entries[:, None] * num_columns + (num_columns - 2 * R)
    split_stride = num_entries.to(tl.int64) * num_columns
    places = (slots * width)[:, None]
    dtype = k_plane_ptr.dtype.element_ty

    if head == 0:
        columns = tl.arange(0, R)[None, :]
        a_k = summed(sums_ptr + columns, slots >= 0, tl.arange(0, R), k_rank, split_stride, NUM_SPLITS)
        tl.store(k_plane_ptr + places + columns, a_k.to(dtype), mask=is_kept & (columns < k_rank))
        a_v = summed(sums_ptr + R + columns, slots >= 0, tl.arange(0, R), v_rank, split_stride, NUM_SPLITS)
        tl.store(v_plane_ptr + places + columns, a_v.to(dtype), mask=is_kept & (columns < v_rank))
    if HAS_SCALE:
        norm_column = tl.load(norm_columns_ptr + adapter, mask=adapter >= 0, other=-1)
        change_column = tl.load(change_columns_ptr + adapter, mask=adapter >= 0, other=-1)
        is_scaled = is_kept & (norm_column >= 0)
        dims = tl.arange(0, BLOCK_D)[None, :]
        rows = tl.load(rows_ptr + entries, mask=is_member, other=0).to(tl.int64)
        k_ptrs = k_ptr + rows[:, None] * k_stride + head * head_dim + dims
        base = tl.load(k_ptrs, mask=is_scaled & (dims < head_dim), other=0.0).to(tl.float32)
        ranks = tl.arange(0, BLOCK_R)
        b_ptrs = b_ptr + adapter.to(tl.int64) * b_stride + ranks[:, None] * b_row_stride + head * head_dim + dims
        whole = base
        for done in tl.static_range(0, R, BLOCK_R):
            is_rank = (done + ranks < k_rank) & (norm_column >= 0)
            a_k = summed(sums_ptr + done + ranks[None, :], slots >= 0, done + ranks, k_rank, split_stride, NUM_SPLITS)
            b = tl.load(b_ptrs + done * b_row_stride, mask=is_rank[:, None] & (dims < head_dim), other=0.0)
            whole = tl.dot(a_k.to(dtype), b, whole, input_precision=PRECISION)
        norm = tl.rsqrt(tl.sum(whole * whole, axis=1) / head_dim + eps)[:, None]
        base_norm = tl.rsqrt(tl.sum(base * base, axis=1) / head_dim + eps)[:, None]
        tl.store(k_plane_ptr + places + norm_column + head, norm.to(dtype), mask=is_scaled)
        tl.store(v_plane_ptr + places + change_column + head, (norm / base_norm - 1.0).to(dtype), mask=is_scaled)


def store_residuals(
    shrunk: Tensor, tiles: LoraTiles, tables: ResidualTables, scale: KeyScaleTables | None, k_plane: Tensor, v_plane: Tensor
) -> None:
    if len(tiles.table) == 0:
        return
    num_splits, num_entries, num_modules, rank = shrunk.shape
    k, b = (scale.k, scale.b) if scale is not None else (k_plane, k_plane)
    num_heads, head_dim = scale.k.shape[1:] if scale is not None else (1, 16)
    _store_residuals_kernel[len(tiles.table), num_heads](
        shrunk, num_modules * rank, num_entries, tiles.table, tiles.rows, tables.slots, tables.ranks, tables.ranks.stride(0),
        tables.widths, k_plane, v_plane, k, k.stride(0), b, b.stride(0), b.stride(1) if scale is not None else 0,
        scale.norm_columns if scale is not None else tables.widths,
        scale.change_columns if scale is not None else tables.widths, head_dim, scale.eps if scale is not None else 0.0,
        NUM_SPLITS=num_splits, R=rank, HAS_SCALE=scale is not None, PRECISION=precision_of(k_plane),
        BLOCK_M=tiles.height, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_R=min(rank, 32), num_warps=_NUM_WARPS,
        num_stages=1,
    )  # fmt: skip


def aot_variants() -> list[AotVariant]:
    """Prefill of Llama-3.1-8B, and of Qwen3-8B with QK-norm."""
    return [_variant("prefill", False), _variant("prefill_qk_norm", True)]


def _variant(name: str, has_scale: bool) -> AotVariant:
    signature = dict.fromkeys(("k_plane_ptr", "v_plane_ptr", "k_ptr", "b_ptr"), "*bf16") | {"shrunk_ptr": "*fp32"}
    tables = ("tiles_ptr", "rows_ptr", "ranks_ptr", "widths_ptr", "norm_columns_ptr", "change_columns_ptr")
    signature |= dict.fromkeys(tables, "*i32") | {
        "slots_ptr": "*i64",
        "num_entries": "i32",
        "ranks_stride": "i32",
        "eps": "fp32",
    }
    sizes = ("num_columns", "k_stride", "b_stride", "b_row_stride", "head_dim")
    signature |= dict.fromkeys(sizes, "i32:16")
    constants = {
        "NUM_SPLITS": 1, "R": 64, "HAS_SCALE": has_scale, "PRECISION": "tf32", "BLOCK_M": 64, "BLOCK_D": 128, "BLOCK_R": 32,
    }  # fmt: skip
    return AotVariant(_store_residuals_kernel, signature, constants, _NUM_WARPS, 1, f"store_residuals_{name}")
