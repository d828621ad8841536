"""From the fused product of a layer to what attention reads: q and k normalised (where the family does so) and rotated, k and
v written to their slots of the cache.

Symbols: T rows, Hq query heads, Hkv kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forkkv_kernels.reference.rms_norm import rms_norm
from forkkv_kernels.reference.rope import apply_rope


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    """QK-norm: weights [D] of q and k, and the epsilon of both."""

    q: Tensor
    k: Tensor
    eps: float


def store_kv(
    qkv: Tensor, cos_sin: Tensor, norms: HeadNorms | None, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """qkv [T, Hq + 2 Hkv, D], cos_sin [T, D] fp32, slots [T] int64 (-1: K and V of this row are not kept), caches
    [slots, Hkv, D] -> q [T, Hq, D] rotated. qkv itself is left as it is."""
    num_kv_heads = key_cache.shape[1]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        qk = torch.cat((rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)), dim=1)
    else:
        qk = qkv[:, : num_heads + num_kv_heads]
    rotated = apply_rope(qk, cos_sin)
    is_kept = slots >= 0
    key_cache[slots[is_kept]] = rotated[is_kept, num_heads:]
    value_cache[slots[is_kept]] = v[is_kept]
    return rotated[:, :num_heads]
