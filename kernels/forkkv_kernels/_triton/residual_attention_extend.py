"""``residual_attention_extend`` in Triton: its launches, and what of it is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from forkkv_kernels._triton.aot import MAX_SHARED_BYTES, AotVariant
from forkkv_kernels._triton.extend_configs import ExtendConfig, RebuildConfig, extend_config, rebuild_config
from forkkv_kernels._triton.extend_kernel import extend_kernel
from forkkv_kernels._triton.rebuild_kv import rebuild_kv_kernel
from forkkv_kernels.reference.residual_attention_extend import ExtendRows
from forkkv_kernels.reference.residuals import Residuals

_LOG2_E = 1.4426950408889634
_HOPPER, _OTHERS = (90, 100, 103), (80, 86, 89, 120)
"""Compute capabilities by ``extend_config``."""

_TABLES = (
    "rebuilt_pages_ptr", "query_starts_ptr", "start_pos_ptr", "base_pages_ptr", "residual_pages_ptr", "residual_lens_ptr",
    "adapters_ptr", "ranks_ptr", "rank_class_ptr", "norm_column_ptr", "change_column_ptr",
)  # fmt: skip
_PLANES = ("out_ptr", "q_ptr", "k_ptr", "v_ptr", "rebuilt_k_ptr", "rebuilt_v_ptr", "b_k_ptr", "b_v_ptr")
_NUMBERS = {
    "cos_sin_ptr": "*fp32", "scale_log2": "fp32", "num_sequences": "i32", "q_stride": "i32:16", "base_pages_stride": "i32",
    "residual_pages_stride": "i32", "rebuilt_tokens": "i32:16",
}  # fmt: skip


def extend(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: ExtendRows,
    scale: float,
    residuals: Residuals | None,
    workspace: Tensor | None,
    config: ExtendConfig | None = None,
    rebuild: RebuildConfig | None = None,
) -> Tensor:
    """Arguments as the op has checked them, ``workspace`` given where ``residuals`` are; configs are for tuning."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_sequences = len(rows.start_pos)
    if not len(q) or not num_sequences:
        return out
    if residuals is None or workspace is None:
        _extend(out, q, k_plane, v_plane, rows, scale, None, None, None, config)
        return out
    step = workspace.shape[1]
    for first in range(0, num_sequences, step):
        own_rows, own = _sequences(rows, residuals, first, min(first + step, num_sequences))
        pages = rebuild_kv(workspace, k_plane, v_plane, own_rows, own, rebuild)
        _extend(out, q, k_plane, v_plane, own_rows, scale, own, workspace, pages, config)
    return out


def rebuild_kv(
    workspace: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: ExtendRows,
    residuals: Residuals,
    config: RebuildConfig | None = None,
) -> Tensor:
    """Fills ``workspace`` [1 or 2, >= N, positions, Hkv, D] with K, or K and V, of sequences with a residual. -> their page
    table [positions / page_size], one for all."""
    positions, num_kv_heads, head_dim = workspace.shape[2:]
    block_d = _block_d(head_dim)
    pages = torch.empty(positions // rows.page_size, dtype=torch.int32, device=workspace.device)
    rank = residuals.b_k.shape[1]
    config = config or rebuild_config(block_d, rank, workspace.dtype.itemsize, num_kv_heads)
    grid = (len(rows.start_pos), triton.cdiv(positions, config.block_n), num_kv_heads // config.heads)
    rebuild_kv_kernel[grid](
        workspace[0], workspace[1] if len(workspace) == 2 else None, pages, k_plane, v_plane, rows.query_starts,
        rows.start_pos, rows.base_pages, residuals.pages, residuals.lens, residuals.adapters, residuals.b_k, residuals.b_v,
        residuals.ranks, residuals.rank_class, residuals.norm_column, residuals.change_column, residuals.cos_sin,
        rows.base_pages.stride(0), residuals.pages.stride(0), positions,
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE_SIZE=rows.page_size, RANK=rank,
        HAS_KEY_SCALE=residuals.norm_column is not None, HAS_V=len(workspace) == 2, BLOCK_N=config.block_n, HEADS=config.heads,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return pages


def _extend(
    out: Tensor,
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: ExtendRows,
    scale: float,
    residuals: Residuals | None,
    workspace: Tensor | None,
    pages: Tensor | None,
    config: ExtendConfig | None,
) -> None:
    num_rows, num_heads, head_dim = q.shape
    group, block_d = num_heads // rows.num_kv_heads, _block_d(head_dim)
    rank = 16 if residuals is None else residuals.b_v.shape[1]
    config = config or extend_config(block_d, rank, q.dtype.itemsize, group, num_rows * num_heads, _shared_bytes(q.device))
    grid = (num_rows // (config.block_m // group) + len(rows.start_pos), rows.num_kv_heads)
    tables: tuple[Tensor | None, ...] = (None,) * 6
    if residuals is not None:
        tables = (
            residuals.pages, residuals.lens, residuals.adapters, residuals.b_v, residuals.ranks, residuals.rank_class,
        )  # fmt: skip
    rebuilt_k, rebuilt_v = (None, None) if workspace is None else (workspace[0], workspace[1] if len(workspace) == 2 else None)
    extend_kernel[grid](
        out, q, k_plane, v_plane, rebuilt_k, rebuilt_v, pages, rows.query_starts, rows.start_pos, rows.base_pages, *tables,
        scale * _LOG2_E, len(rows.start_pos), q.stride(0), rows.base_pages.stride(0),
        0 if residuals is None else residuals.pages.stride(0), 0 if workspace is None else workspace.shape[2],
        NUM_KV_HEADS=rows.num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE_SIZE=rows.page_size,
        RANK=rank, REBUILT="" if rebuilt_k is None else "k" if rebuilt_v is None else "kv",
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _sequences(rows: ExtendRows, residuals: Residuals, first: int, end: int) -> tuple[ExtendRows, Residuals]:
    """Those of sequences [first, end); rows keep their numbers."""
    if first == 0 and end == len(rows.start_pos):
        return rows, residuals
    starts, start_pos = rows.query_starts[first : end + 1], rows.start_pos[first:end]
    own = {"pages": residuals.pages[first:end], "lens": residuals.lens[first:end], "adapters": residuals.adapters[first:end]}
    return (
        replace(rows, query_starts=starts, start_pos=start_pos, base_pages=rows.base_pages[first:end]),
        replace(residuals, **own),
    )


def _block_d(head_dim: int) -> int:
    return max(32, triton.next_power_of_2(head_dim))


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return MAX_SHARED_BYTES[90]
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def aot_variants() -> list[AotVariant]:
    """Llama-3.1-8B first; other pages, ranks, heads of 64 (as in Qwen2.5-0.5B) and of 256, QK-norm; what other cards take."""
    variants = [
        _variant("kv"),
        _rebuild_variant(),
        _variant(""),
        _variant("k"),
        _variant("", dtype="fp16"),
        _variant("kv", page_size=16),
        _variant("k", page_size=16, rank=64),
        _variant("kv", num_rows=128),
        _variant("k", num_rows=128),
        _variant("kv", head_dim=64, num_kv_heads=2, group=7),
        _variant("k", head_dim=64, num_kv_heads=2, group=7),
        _rebuild_variant(has_key_scale=True, rank=128, page_size=16),
    ]
    other = {"shared_bytes": MAX_SHARED_BYTES[86]}
    others = [_variant("kv", **other), _rebuild_variant(), _variant("", **other)]
    few = [_variant("k", **other), _variant("k", num_rows=128, **other)]
    others += [_variant("kv", num_rows=128, **other), *(variant._replace(max_local_bytes=16) for variant in few)]
    variants += [_variant("kv", head_dim=256, num_kv_heads=4, group=2)]
    hopper = [variant._replace(archs=_HOPPER) for variant in variants]
    others = [variant._replace(archs=_OTHERS, name=f"other_{variant.name}") for variant in others]
    return hopper[:2] + others[:2] + hopper[2:] + others[2:]


def _variant(
    rebuilt: str,
    *,
    dtype: str = "bf16",
    head_dim: int = 128,
    num_kv_heads: int = 8,
    group: int = 4,
    page_size: int = 64,
    rank: int = 16,
    num_rows: int = 8192,
    shared_bytes: int = MAX_SHARED_BYTES[90],
) -> AotVariant:
    config = extend_config(head_dim, rank, 2, group, num_rows * group * num_kv_heads, shared_bytes)
    constants = {
        "NUM_KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "PAGE_SIZE": page_size,
        "RANK": rank, "REBUILT": rebuilt, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
    }  # fmt: skip
    left_out = set() if rebuilt == "kv" else {"rebuilt_v_ptr"}
    if not rebuilt:
        left_out |= {
            "rebuilt_k_ptr", "rebuilt_pages_ptr", "residual_pages_ptr", "residual_lens_ptr", "adapters_ptr", "b_v_ptr",
            "ranks_ptr", "rank_class_ptr",
        }  # fmt: skip
    name = f"extend_{rebuilt or 'plain'}[{dtype},d{head_dim},g{group},page{page_size},r{rank},m{config.block_m}]"
    signature = _signature(extend_kernel, dtype, left_out)
    return AotVariant(extend_kernel, signature, constants | dict.fromkeys(left_out), config.num_warps, config.num_stages, name)


def _rebuild_variant(*, page_size: int = 64, rank: int = 16, has_key_scale: bool = False) -> AotVariant:
    config = rebuild_config(128, rank, 2, 8)
    constants = {
        "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_D": 128, "PAGE_SIZE": page_size, "RANK": rank,
        "HAS_KEY_SCALE": has_key_scale, "HAS_V": True, "BLOCK_N": config.block_n, "HEADS": config.heads,
    }  # fmt: skip
    left_out = set() if has_key_scale else {"norm_column_ptr", "change_column_ptr"}
    name = f"rebuild_kv[bf16,d128,page{page_size},r{rank}{',qk_norm' if has_key_scale else ''}]"
    signature = _signature(rebuild_kv_kernel, "bf16", left_out)
    return AotVariant(
        rebuild_kv_kernel, signature, constants | dict.fromkeys(left_out), config.num_warps, config.num_stages, name
    )


def _signature(kernel: Any, dtype: str, left_out: set[str]) -> Mapping[str, str]:
    types = dict.fromkeys(_TABLES, "*i32") | dict.fromkeys(_PLANES, f"*{dtype}") | _NUMBERS
    return {name: type_ for name, type_ in types.items() if name in kernel.arg_names and name not in left_out}
