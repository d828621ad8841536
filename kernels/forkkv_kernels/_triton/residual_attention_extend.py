"""``residual_attention_extend`` in Triton: its launch, and what of it is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant
from forkkv_kernels._triton.extend_configs import ExtendConfig, extend_config, rebuild_config
from forkkv_kernels._triton.extend_kernel import extend_kernel
from forkkv_kernels._triton.rebuild_kv import rebuild_kv, rebuild_kv_kernel, residual_tables
from forkkv_kernels.reference.residual_attention_extend import ExtendResiduals, ExtendRows

_LOG2_E = 1.4426950408889634
_TABLES = (
    "query_starts_ptr", "start_pos_ptr", "base_pages_ptr", "residual_pages_ptr", "residual_lens_ptr", "adapters_ptr",
    "ranks_ptr", "rank_class_ptr", "norm_column_ptr", "change_column_ptr",
)  # fmt: skip
_PLANES = ("out_ptr", "q_ptr", "k_ptr", "v_ptr", "rebuilt_k_ptr", "rebuilt_v_ptr", "b_k_ptr", "b_v_ptr")
_NUMBERS = {
    "cos_sin_ptr": "*fp32", "scale_log2": "fp32", "num_sequences": "i32", "q_stride": "i32:16", "base_pages_stride": "i32",
    "residual_pages_stride": "i32", "rebuilt_tokens": "i32:16",
}  # fmt: skip
_OF_RESIDUALS = (
    "residual_pages_ptr", "residual_lens_ptr", "adapters_ptr", "ranks_ptr", "rank_class_ptr", "norm_column_ptr",
    "change_column_ptr", "b_k_ptr", "b_v_ptr", "cos_sin_ptr",
)  # fmt: skip


def extend(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: ExtendRows,
    scale: float,
    residuals: ExtendResiduals | None,
    workspace: Tensor | None,
    config: ExtendConfig | None = None,
) -> Tensor:
    """Arguments as the op has checked them; ``config`` is for tuning."""
    num_rows, num_heads, head_dim = q.shape
    num_sequences = len(rows.start_pos)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    way = "none" if residuals is None else "tile" if workspace is None else "rebuilt"
    group = num_heads // rows.num_kv_heads
    block_d = max(32, triton.next_power_of_2(head_dim))
    config = config or extend_config(way == "tile", block_d, q.dtype.itemsize, group, num_rows)
    if not num_rows or not num_sequences:
        return out
    if residuals is not None and workspace is not None:
        rebuild_kv(workspace, k_plane, v_plane, rows, residuals, block_d)
    rebuilt_k, rebuilt_v = (None, None) if way != "rebuilt" or workspace is None else workspace
    has_key_scale = residuals is not None and residuals.norm_column is not None
    grid = (num_rows // (config.block_m // group) + num_sequences, rows.num_kv_heads)
    extend_kernel[grid](
        out, q, k_plane, v_plane, rebuilt_k, rebuilt_v, rows.query_starts, rows.start_pos, rows.base_pages,
        *residual_tables(residuals),
        scale * _LOG2_E, num_sequences, q.stride(0), rows.base_pages.stride(0),
        0 if residuals is None else residuals.pages.stride(0), 0 if rebuilt_k is None else rebuilt_k.shape[1],
        NUM_KV_HEADS=rows.num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE_SIZE=rows.page_size,
        RANK=16 if residuals is None else residuals.b_k.shape[1], RESIDUAL=way, HAS_KEY_SCALE=has_key_scale,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def aot_variants() -> list[AotVariant]:
    """Llama-3.1-8B first, then other pages, ranks, heads of 64 (as in Qwen2.5-0.5B) and of 256, QK-norm."""
    in_loop = {"archs": (90,)}  # sm_80 is a few registers short
    return [
        _extend("rebuilt"),
        _rebuild(),
        _extend("none"),
        _extend("tile")._replace(**in_loop),
        _extend("none", dtype="fp16"),
        _extend("rebuilt", page_size=16),
        _extend("tile", page_size=16, rank=64)._replace(**in_loop),
        _extend("rebuilt", head_dim=64, num_kv_heads=2, group=7),
        _extend("tile", head_dim=64, num_kv_heads=2, group=7)._replace(**in_loop),
        _extend("tile", has_key_scale=True)._replace(**in_loop),
        _extend("rebuilt", head_dim=256, num_kv_heads=4, group=2)._replace(**in_loop),
        _extend("tile", head_dim=256, num_kv_heads=4, group=2)._replace(**in_loop, max_local_bytes=96),
        _rebuild(has_key_scale=True, rank=64, page_size=16),
    ]


def _extend(
    way: str,
    *,
    dtype: str = "bf16",
    head_dim: int = 128,
    num_kv_heads: int = 8,
    group: int = 4,
    page_size: int = 64,
    rank: int = 16,
    has_key_scale: bool = False,
) -> AotVariant:
    config = extend_config(way == "tile", head_dim, 2, group, 8192)
    constants = {
        "NUM_KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "PAGE_SIZE": page_size,
        "RANK": rank, "RESIDUAL": way, "HAS_KEY_SCALE": has_key_scale, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
    }  # fmt: skip
    left_out = set() if way == "rebuilt" else {"rebuilt_k_ptr", "rebuilt_v_ptr"}
    if way == "none":
        left_out |= {*_OF_RESIDUALS}
    elif not has_key_scale:
        left_out |= {"norm_column_ptr", "change_column_ptr"}
    name = f"extend_{way}[{dtype},d{head_dim},g{group},page{page_size},r{rank}{',qk_norm' if has_key_scale else ''}]"
    signature = _signature(extend_kernel, dtype, left_out)
    return AotVariant(extend_kernel, signature, constants | dict.fromkeys(left_out), config.num_warps, config.num_stages, name)


def _rebuild(*, page_size: int = 64, rank: int = 16, has_key_scale: bool = False) -> AotVariant:
    config = rebuild_config(128, 8)
    constants = {
        "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_D": 128, "PAGE_SIZE": page_size, "RANK": rank,
        "HAS_KEY_SCALE": has_key_scale, "ALIGN": 128, "BLOCK_N": config.block_n, "HEADS": config.heads,
    }  # fmt: skip
    left_out = set() if has_key_scale else {"norm_column_ptr", "change_column_ptr"}
    name = f"rebuild_kv[bf16,d128,page{page_size},r{rank}{',qk_norm' if has_key_scale else ''}]"
    signature = _signature(rebuild_kv_kernel, "bf16", left_out)
    return AotVariant(rebuild_kv_kernel, signature, constants | dict.fromkeys(left_out), config.num_warps, 3, name)


def _signature(kernel: Any, dtype: str, left_out: set[str]) -> Mapping[str, str]:
    types = dict.fromkeys(_TABLES, "*i32") | dict.fromkeys(_PLANES, f"*{dtype}") | _NUMBERS
    return {name: type_ for name, type_ in types.items() if name in kernel.arg_names and name not in left_out}
