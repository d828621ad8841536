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
]

MERGED_BLOCK = 64
"""Tokens of a block of whole K."""

Listed = tuple[int, int]
"""Slots: the first one, and the address of all of them, int64, or 0 where they are consecutive."""


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
    pool: Tensor, out: Tensor | None, slots: Listed, num_tokens: int, residual: Mapping[str, int],
    cos_sin: Tensor | None = None, merged_k: Tensor | None = None, first_position: int = 0,
) -> None:  # fmt: skip
    """K or V of consecutive tokens head by head, with the low-rank part of an adapter.

    pool [slots, Hkv, D]; out [Hkv, num_tokens, D] contiguous, or None where only ``merged_k`` is wanted. residual: the fields
    of ``Gather`` from ``num_residual`` on; that many tokens, the first ones, have it. cos_sin [num_tokens, D] fp32 of their
    positions for K, None for V.
    merged_k [Hkv, M, D] contiguous, M a multiple of ``MERGED_BLOCK``: memory for positions [0, M), to which K of tokens with a
    residual is written in the order in which ``attend_tiles`` reads it; the first token stands at ``first_position``.
    """
    functions = functions_for(pool)
    if functions is None:
        raise RuntimeError(f"there is no gather_heads for {pool.dtype} on {pool.device}; ask is_available first")
    call = Gather(
        num_kv_heads=pool.shape[1], head_dim=pool.shape[2], num_tokens=num_tokens, slots_first=slots[0], slots_listed=slots[1],
        pool=pool.data_ptr(), first_position=first_position, num_threads=num_threads(), **residual,
    )  # fmt: skip
    if out is not None:
        call.out, call.out_stride = out.data_ptr(), out.stride(0)
    if merged_k is not None:
        call.packed, call.packed_stride = merged_k.data_ptr(), merged_k.stride(0)
    if cos_sin is not None:
        call.cos_sin = cos_sin.data_ptr()
    functions.gather(ctypes.byref(call))
