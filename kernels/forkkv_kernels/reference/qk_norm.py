"""K of shared tokens on a model that normalises K over each head before it rotates it (QK-norm, weight gamma).

With kb = x W of one kv head, k = kb + a B and n(k) = 1 / sqrt(mean(k^2) + eps), a page holds Kb = R(n(kb) gamma kb), the K
of every other model's base page, and the adapter's K is not that plus something, yet a sum with two numbers of the token:

    K = R(n(k) gamma k) = (1 + c) Kb + n(k) R(a (B gamma))            c = n(k) / n(kb) - 1

Both are known when a is written, and are kept beside it. Of the ratio only the change c is: c is as small as the adapter's
part of k is, so that rounding it to bf16 costs no more than rounding a does, where the rounded ratio would shift every score
of a key by as much as its whole K is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KeyScale:
    """norm [S, Hkv] is n(k), change [S, Hkv] is c: of S tokens under one adapter, any float dtype."""

    norm: Tensor
    change: Tensor


def inverse_rms(k: Tensor, eps: float) -> Tensor:
    """k [S, Hkv, D] before its norm -> n(k) [S, Hkv] fp32."""
    return torch.rsqrt(k.float().square().mean(dim=-1) + eps)


def key_scale(base_k: Tensor, base_norm: Tensor, a_k: Tensor, b_k: Tensor, eps: float) -> KeyScale:
    """base_k [S, Hkv, D] before its norm, base_norm [S, Hkv] its ``inverse_rms``; a_k [S, r], b_k [r, Hkv * D] without gamma
    -> fp32."""
    norm = inverse_rms(torch.addmm(base_k.flatten(1), a_k, b_k).view(base_k.shape), eps)
    return KeyScale(norm, norm / base_norm - 1.0)


def scale_k(base_k: Tensor, rotated: Tensor, scale: KeyScale) -> Tensor:
    """(1 + c) Kb + n(k) rotated, in fp32: base_k and rotated [S, Hkv, D] -> [S, Hkv, D] in base_k's dtype."""
    norm, change = scale.norm.float().unsqueeze(-1), scale.change.float().unsqueeze(-1)
    return (base_k * (1.0 + change)).addcmul_(rotated.float(), norm).to(base_k.dtype)


def scale_scores_(base: Tensor, added: Tensor, scale: KeyScale) -> None:
    """The same on scores, in place: base [Hkv, T, g, S] fp32 becomes (1 + c) base, added [Hkv, T, g, S] fp32 n(k) added."""
    base.mul_((1.0 + scale.change.float()).t()[:, None, None])
    added.mul_(scale.norm.float().t()[:, None, None])
