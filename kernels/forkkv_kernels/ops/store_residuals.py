"""Residual KV into its slots: see the reference of the same name for the layout, tables and symbols.

Source: the residual of arXiv 2604.06370; the scale of keys under QK-norm is derived in ``reference.qk_norm``. Nothing is read
back from the device, so that a CUDA graph captures it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkkv_kernels.checks import check_device, check_dtype, check_rows, check_shape
from forkkv_kernels.launch import use_triton
from forkkv_kernels.reference import store_residuals as reference
from forkkv_kernels.reference.lora_tiles import LoraTiles
from forkkv_kernels.reference.store_residuals import KeyScaleTables, ResidualTables

__all__ = ["KeyScaleTables", "ResidualTables", "store_residuals"]


def store_residuals(
    shrunk: Tensor, tiles: LoraTiles, tables: ResidualTables, scale: KeyScaleTables | None, k_plane: Tensor, v_plane: Tensor
) -> None:
    """shrunk [S, E, M, R] fp32 as ``lora_shrink_tiles`` gives it, k and v its last two modules; k_plane, v_plane [elements of a
    plane] contiguous (fp32, fp16, bf16), written in place. The slots of a call are distinct."""
    _check(shrunk, tiles, tables, scale, k_plane, v_plane)
    if not use_triton(k_plane):
        return reference.store_residuals(shrunk, tiles, tables, scale, k_plane, v_plane)
    from forkkv_kernels._triton import store_residuals as kernels

    return kernels.store_residuals(shrunk, tiles, tables, scale, k_plane, v_plane)


def _check(
    shrunk: Tensor, tiles: LoraTiles, tables: ResidualTables, scale: KeyScaleTables | None, k_plane: Tensor, v_plane: Tensor
) -> None:
    num_entries, num_modules, rank = shrunk.shape[1:]
    num_adapters = len(tables.widths)
    check_dtype("shrunk", shrunk, torch.float32)
    check_shape("rows", tiles.rows, num_entries)
    check_shape("slots", tables.slots, num_entries)
    check_dtype("slots", tables.slots, torch.int32, torch.int64)
    check_shape("ranks", tables.ranks, num_adapters, 2)
    check_dtype("ranks", tables.ranks, torch.int32)
    check_rows("ranks", tables.ranks)
    check_dtype("widths", tables.widths, torch.int32)
    check_dtype("v_plane", v_plane, k_plane.dtype)
    check_device(k_plane.device, shrunk=shrunk, slots=tables.slots, ranks=tables.ranks, widths=tables.widths, v_plane=v_plane)
    for name, tensor in (("shrunk", shrunk), ("k_plane", k_plane), ("v_plane", v_plane)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, and has to be contiguous")
    if num_modules < 2:
        raise ValueError(f"shrunk has {num_modules} modules: its last two have to be k and v")
    if scale is not None:
        num_heads, head_dim = scale.k.shape[1:]
        check_dtype("k", scale.k, k_plane.dtype)
        check_dtype("b", scale.b, k_plane.dtype)
        check_shape("b", scale.b, num_adapters, rank, num_heads * head_dim)
        check_rows("b", scale.b)
        check_shape("norm_columns", scale.norm_columns, num_adapters)
        check_shape("change_columns", scale.change_columns, num_adapters)
        if scale.k.stride()[1:] != (head_dim, 1):
            raise ValueError(f"k has strides {scale.k.stride()}: the heads of a row have to lie side by side")
