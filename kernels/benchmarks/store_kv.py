"""Rotation and KV store against torch's own ops, Llama-3.1-8B and (with QK-norm) Qwen3-8B."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from forkkv_kernels.launch import interpreted
from forkkv_kernels.ops.store_kv import HeadNorms, store_kv
from forkkv_kernels.reference.rms_norm import rms_norm
from forkkv_kernels.reference.rope import apply_rope
from harness import Call, copy_tb_per_s, device, floor_ms, is_tiny, num_inputs, row, time_ms
from torch import Tensor

Inputs = tuple[Tensor, Tensor, HeadNorms | None, Tensor, Tensor, Tensor]


def bench(quick: bool) -> Iterator[dict[str, Any]]:
    heads, head_dim, dtype = ((6, 2), 16, torch.float32) if is_tiny() else ((32, 8), 128, torch.bfloat16)
    rate = copy_tb_per_s(quick)
    with interpreted() if is_tiny() else nullcontext():
        for has_norms in (False, True):
            for num_rows in (2,) if is_tiny() else (32, 8192):
                width = (heads[0] + 2 * heads[1]) * head_dim
                num_bytes = num_rows * (2 * width * dtype.itemsize + 4 * head_dim)
                sets = [_inputs(num_rows, heads, head_dim, dtype, has_norms) for _ in range(num_inputs(num_bytes))]
                ours: list[Call] = [lambda s=s: store_kv(*s) for s in sets]
                torchs: list[Call] = [lambda s=s: _torch_store_kv(*s) for s in sets]
                baseline, ms = time_ms(torchs, quick), time_ms(ours, quick)
                name = f"store_kv{' with QK-norm' if has_norms else ''} {num_rows} rows"
                yield row(name, ms, baseline_ms=baseline, target=1.0, floor_ms=floor_ms(num_bytes, 0, rate, 1))


def _inputs(num_rows: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, has_norms: bool) -> Inputs:
    """Slots in an order of their own, all kept."""
    qkv = torch.randn(num_rows, heads[0] + 2 * heads[1], head_dim, device=device(), dtype=dtype)
    norms = HeadNorms(*torch.rand(2, head_dim, device=device(), dtype=dtype), 1e-6) if has_norms else None
    angles = torch.rand(num_rows, head_dim // 2, device=device())
    slots = torch.randperm(2 * num_rows, device=device())[:num_rows]
    caches = torch.zeros(2, 2 * num_rows, heads[1], head_dim, device=device(), dtype=dtype)
    return qkv, torch.cat((angles.cos(), angles.sin()), dim=-1), norms, slots, *caches


def _torch_store_kv(
    qkv: Tensor, cos_sin: Tensor, norms: HeadNorms | None, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """As the reference, for rows that are all kept: which are would have to be read back from the device."""
    num_kv_heads = key_cache.shape[1]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
    rotated = apply_rope(torch.cat((q, k), dim=1), cos_sin)
    key_cache.index_copy_(0, slots, rotated[:, num_heads:])
    value_cache.index_copy_(0, slots, v)
    return rotated[:, :num_heads].contiguous()
