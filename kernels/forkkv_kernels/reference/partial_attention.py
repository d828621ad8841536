"""Attention over some of a row's keys, and the merge of such parts into attention over all of them:

    o_i = softmax(s_i) V_i,   lse_i = log sum exp(s_i)
    o = w o_1 + (1 - w) o_2   with w = sigmoid(lse_1 - lse_2),   lse = log(exp(lse_1) + exp(lse_2))

Symbols: T query rows, S keys, Hq query heads, Hkv kv heads, g = Hq / Hkv, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -1e30
"""Score of a key that a row may not see. Finite: a row with no visible key in one part must not become NaN, and its
weight vanishes when the parts are merged."""


FLASH_MAX_KEYS = 1024
"""Up to so many keys torch's flash attention beats products around its softmax."""


@dataclass(frozen=True, slots=True, eq=False)
class PartialAttention:
    """Log-sum-exp of the scores [Hkv, T, g] and output [Hkv, T, g, D], both fp32."""

    lse: Tensor
    output: Tensor


def attend_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> PartialAttention:
    """Few rows against one run of keys: q [Hkv, T, g, D] scaled, k and v [S, Hkv, D], mask [T, S] bool (True: hidden).

    Two products around torch's softmax: over 2,048 strided keys in bf16 two cores take 0.23 ms for 3 rows a head and 0.48
    for 24, where torch's flash attention takes 0.39 and 0.74. Over few keys it is the other way round: 0.03 for 64 keys in
    place of a dozen calls in 0.1.
    """
    num_kv_heads, _, group, head_dim = q.shape
    if len(k) <= FLASH_MAX_KEYS and _has_flash(q):
        hidden = mask.repeat_interleave(group, dim=0)[None] if mask is not None else None
        rows = q.reshape(1, num_kv_heads, -1, head_dim)
        lse, output = _flash(rows, k.transpose(0, 1)[None], v.transpose(0, 1)[None], hidden)
        return PartialAttention(lse.view(q.shape[:3]), output.view(q.shape))
    keys = k.transpose(0, 1)
    if keys.dtype != torch.float32:
        keys = keys.contiguous()  # oneDNN multiplies a strided bf16 operand three times slower than it copies it
    scores = torch.matmul(q.reshape(num_kv_heads, -1, head_dim), keys.transpose(1, 2)).view(*q.shape[:3], -1)
    lse, weights = softmax_with_lse(scores, mask[None, :, None] if mask is not None else None, v.dtype)
    output = torch.matmul(weights.view(num_kv_heads, -1, len(v)), v.transpose(0, 1))
    return PartialAttention(lse, output.float().view(q.shape))


def attend_padded(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> PartialAttention:
    """N rows, each against keys of its own, in one call: q [Hkv, N, g, D] scaled, k and v [N, S, Hkv, D], hidden [N, S] bool:
    keys that row n may not see (they must be finite)."""
    if _has_flash(q):
        lse, output = _flash(q.transpose(0, 1), k.transpose(1, 2), v.transpose(1, 2), hidden[:, None])
        return PartialAttention(lse.transpose(0, 1), output.transpose(0, 1))
    scores = torch.einsum("hngd,nshd->hngs", q, k)
    lse, weights = softmax_with_lse(scores, hidden[None, :, None], v.dtype)
    return PartialAttention(lse, torch.einsum("hngs,nshd->hngd", weights, v).float())


def _has_flash(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype != torch.float16


def _flash(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's CPU flash attention, which also gives the log-sum-exp: q [B, H, T, D] scaled, k and v [B, H, S, D], hidden
    [B, T or 1, S] bool -> [B, H, T] and [B, H, T, D], both fp32."""
    bias = None
    if hidden is not None:
        bias = torch.where(hidden, torch.finfo(q.dtype).min / 2, 0.0).to(q.dtype).unsqueeze(1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=1.0)
    return lse.view(out.shape[:3]), out.float()


def softmax_with_lse(scores: Tensor, hidden: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scores [..., S], hidden bool that spreads over them -> log-sum-exp [...] fp32, softmax [..., S] in ``dtype``.

    The largest weight is exp(largest score - lse): two maxima are cheaper than another pass of exponentials.
    """
    if hidden is not None:
        scores = scores.float().masked_fill(hidden, MASKED)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    lse = scores.amax(dim=-1).float() - weights.amax(dim=-1).log()
    return lse, weights.to(dtype)


def empty_partial(num_kv_heads: int, num_rows: int, group: int, head_dim: int, device: torch.device) -> PartialAttention:
    """Attention over no key at all: the neutral element of ``merge_partials_``."""
    shape = (num_kv_heads, num_rows, group)
    return PartialAttention(torch.full(shape, 2 * MASKED, device=device), torch.zeros(*shape, head_dim, device=device))


def merge_partials_(into: PartialAttention, part: PartialAttention, rows: Tensor | None) -> None:
    """Fold ``part``, whose row i is row ``rows[i]`` of ``into``, in place. rows [n] int64; None: all of them, in order."""
    if rows is None:
        into.output.lerp_(part.output, torch.sigmoid(part.lse - into.lse).unsqueeze(-1))
        torch.logaddexp(into.lse, part.lse, out=into.lse)
        return
    lse, output = into.lse[:, rows], into.output[:, rows]
    into.output[:, rows] = output.lerp_(part.output, torch.sigmoid(part.lse - lse).unsqueeze(-1))
    into.lse[:, rows] = torch.logaddexp(lse, part.lse)


def finish_partial(partial: PartialAttention) -> Tensor:
    """-> [T, Hq, D] fp32."""
    return partial.output.transpose(0, 1).flatten(1, 2)
