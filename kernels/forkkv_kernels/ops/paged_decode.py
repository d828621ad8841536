"""Attention of decode rows over tiles of paged keys, all of them in one call (``_cpu/attention.cpp``).

Tables are rows of 64-bit integers with addresses among them, one column for each field of ``structs.TILE_FIELDS`` and
``structs.RESIDUAL_FIELDS``. Whoever builds them keeps what the addresses point at.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from forkkv_kernels._cpu.library import functions_for, functions_on
from forkkv_kernels._cpu.structs import RESIDUAL_FIELDS, TILE_FIELDS, Decode, Gather, num_threads

__all__ = [
    "MERGED_BLOCK",
    "RESIDUAL_FIELDS",
    "TILE_FIELDS",
    "attend_tiles",
    "gather_heads",
    "is_available",
    "pack_merged_k",
]

MERGED_BLOCK = 64
"""Tokens of a block of whole K."""


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    return functions_on(device, dtype) is not None


def attend_tiles(
    q: Tensor, out: Tensor, rows: Tensor, base_k: Tensor, base_v: Tensor, cos_sin: Tensor, tiles: int, num_tiles: int
) -> None:
    """Writes rows ``rows`` [N] int64 of out [T, Hq, D] from those of q [T, Hq, D] (rotated, not scaled), both contiguous.

    base_k and base_v [slots, Hkv, D]; cos_sin [positions, D] fp32; tiles: address of the table [num_tiles, TILE_FIELDS].
    """
    functions = functions_for(q)
    if functions is None:
        raise RuntimeError(f"there is no attend_tiles for {q.dtype} on {q.device}; ask is_available first")
    num_kv_heads, head_dim = base_k.shape[1:]
    call = Decode(
        num_kv_heads, q.shape[1] // num_kv_heads, head_dim, len(rows), rows.data_ptr(), q.data_ptr(), out.data_ptr(),
        base_k.data_ptr(), base_v.data_ptr(), cos_sin.data_ptr(), num_tiles, tiles, num_threads(),
    )  # fmt: skip
    functions.decode(ctypes.byref(call))


def gather_heads(
    pool: Tensor, out: Tensor, slots: tuple[int, int], num_residual: int, residual: Mapping[str, int], cos_sin: Tensor | None
) -> None:
    """out [Hkv, S, D] contiguous = K or V of S tokens of a pool [slots, Hkv, D], plus the low-rank part of the first
    ``num_residual``.

    slots: first slot, and the address of S slots, or 0 where they are consecutive. residual: the fields of ``Gather`` from
    ``residual_first`` on. cos_sin [S, D] fp32 for K, None for V.
    """
    _gather(pool, out.data_ptr(), out.stride(0), out.shape[1], slots, num_residual, residual, cos_sin)


def pack_merged_k(
    pool: Tensor, out: Tensor, slots: tuple[int, int], start: int, end: int, residual: Mapping[str, int], cos_sin: Tensor
) -> None:
    """An adapter's whole K of the tokens at positions [start, end), to where ``attend_tiles`` reads it.

    out [Hkv, M, D] contiguous, M a multiple of ``MERGED_BLOCK``: memory for positions [0, M) in an order of its own. cos_sin
    [end - start, D] fp32; other arguments as of ``gather_heads``.
    """
    _gather(
        pool, out.data_ptr(), out.stride(0), end - start, slots, end - start, residual, cos_sin,
        is_packed=1, first_position=start,
    )  # fmt: skip


def _gather(
    pool: Tensor, out: int, out_stride: int, num_tokens: int, slots: tuple[int, int], num_residual: int,
    residual: Mapping[str, int], cos_sin: Tensor | None, **layout: int,
) -> None:  # fmt: skip
    functions = functions_for(pool)
    if functions is None:
        raise RuntimeError(f"there is no gather of heads for {pool.dtype} on {pool.device}; ask is_available first")
    call = Gather(
        num_kv_heads=pool.shape[1], head_dim=pool.shape[2], num_tokens=num_tokens, slots_first=slots[0], slots_listed=slots[1],
        pool=pool.data_ptr(), out=out, out_stride=out_stride, num_residual=num_residual,
        cos_sin=cos_sin.data_ptr() if cos_sin is not None else 0, num_threads=num_threads(), **layout, **residual,
    )  # fmt: skip
    functions.gather(ctypes.byref(call))
