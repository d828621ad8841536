"""Attention over base KV and a low-rank residual (ResidualAttention, ForkKV, arXiv 2604.06370).

Token j of a shared context has base K (rotated) and V, and for adapter i the residuals a_k = x A_k and a_v = x A_v:

    K_j = Kb_j + R_j(a_k_j B_k)            V_j = Vb_j + a_v_j B_v            o = softmax(q K^T / sqrt(D)) V

Two ways to the same numbers:

* many query rows: reconstruct K and V once, then ordinary attention (``reconstruct_k``, ``reconstruct_v``, ``attend``);
* few query rows, stacked over agents: read base K and V once for all of them and never build K or V at all
  (``attend_grouped``). With q = [q1 | q2], B_k = [B1 | B2]:

      q . R_j(a B) = sum_r a_r [ cos_j . (q1 B1_r + q2 B2_r) + sin_j . (q2 B1_r - q1 B2_r) ]

  so one matrix product of the cos|sin table with a folded query gives the residual's scores, and for V,
  P (Vb + a_v B_v) = P Vb + (P a_v) B_v.

Symbols: T query rows, S keys, Hq query heads, Hkv kv heads, g = Hq / Hkv, D head dim, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from forkkv_kernels.reference.partial_attention import MASKED, PartialAttention, softmax_with_lse
from forkkv_kernels.reference.qk_norm import KeyScale, scale_k, scale_scores_
from forkkv_kernels.reference.rope import apply_rope

_FOLD_MAX_ELEMS = 1 << 22
"""Largest intermediate [rows * r, keys] of the folded product, elements: above it, keys are cut into pieces."""

_SCORES_MAX_ELEMS = 1 << 24
"""Largest score matrix of ``attend``, elements: 32 MiB in bf16. More rows are attended in pieces."""

_FOLD_MAX_ROWS = 32
"""Query rows (per kv head) up to which folding beats reconstructing K. Folding costs r products a row and key,
reconstruction a fixed dozen passes over K."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupResidual:
    """The residual that rows [row_start, row_end) of a group add to base KV.

    a_k [S, r_k], b_k [r_k, Hkv, D]; a_v [S, r_v], b_v [r_v, Hkv, D]; a pair is None where the adapter leaves k or v alone.
    k_scale goes with a_k on a model with QK-norm (``qk_norm``). merged_k [Hkv, S, D]: the adapter's whole K where it is at
    hand, read instead of base K, a_k and b_k.
    """

    row_start: int
    row_end: int
    a_k: Tensor | None
    b_k: Tensor | None
    a_v: Tensor | None
    b_v: Tensor | None
    k_scale: KeyScale | None = None
    merged_k: Tensor | None = None


def reconstruct_k(base_k: Tensor, a_k: Tensor, b_k: Tensor, cos_sin: Tensor, scale: KeyScale | None = None) -> Tensor:
    """base_k [S, Hkv, D] rotated, a_k [S, r], b_k [r, Hkv, D], cos_sin [S, D] fp32 -> K [S, Hkv, D]; ``scale`` with QK-norm."""
    delta = torch.matmul(a_k, b_k.flatten(1)).view(base_k.shape)
    rotated = apply_rope(delta, cos_sin)
    return base_k + rotated if scale is None else scale_k(base_k, rotated, scale)


def reconstruct_v(base_v: Tensor, a_v: Tensor, b_v: Tensor) -> Tensor:
    """base_v [S, Hkv, D], a_v [S, r], b_v [r, Hkv, D] -> V [S, Hkv, D]."""
    return torch.addmm(base_v.flatten(1), a_v, b_v.flatten(1)).view(base_v.shape)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Many rows, the last T of S tokens: q [T, Hq, D], k and v [S, Hkv, D] -> [T, Hq, D]; row t sees keys [0, S - T + t]."""
    return attend_heads(q, *(x.transpose(0, 1).contiguous() for x in (k, v)))


def attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same over k and v [Hkv, S, D] as they lie head by head.

    In bf16 on a CPU by two products around torch's softmax, scores rounded to bf16 as in Hugging Face's eager attention: 64
    rows over 2,112 keys take two cores 2.1 ms, torch's flash attention 4.2.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _attend_by_products(q, k, v)
    num_rows, num_keys = len(q), k.shape[1]
    first = num_keys - num_rows
    mask = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q.device).tril_(first) if first else None
    query = q.transpose(0, 1).unsqueeze(0)
    out = functional.scaled_dot_product_attention(
        query, k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1)


def _attend_by_products(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, num_keys, _ = keys.shape
    scaled = (q * head_dim**-0.5).view(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1)
    step = max(1, _SCORES_MAX_ELEMS // (num_heads * num_keys))
    pieces = []
    for start in range(0, num_rows, step):
        own = scaled[:, start : start + step]
        end = num_keys - num_rows + start + own.shape[1]  # no row of this piece sees a later key
        scores = torch.bmm(own.flatten(1, 2), keys[:, :end].transpose(1, 2))
        last = scores.view(*own.shape[:3], end)[..., end - own.shape[1] :]
        last.masked_fill_(_future(own.shape[1]), MASKED)
        torch.softmax(scores, dim=-1, out=scores)
        pieces.append(torch.bmm(scores, values[:, :end]).view(own.shape))
    out = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
    return out.transpose(0, 1).reshape(num_rows, num_heads, head_dim)


def _future(num_rows: int) -> Tensor:
    """[num_rows, 1, num_rows] bool: of the last keys, those that come after a row's own."""
    return torch.ones(num_rows, num_rows, dtype=torch.bool).triu_(1).unsqueeze(1)


def attend_grouped(
    q: Tensor,
    base_k: Tensor,
    base_v: Tensor,
    cos_sin: Tensor,
    residuals: Sequence[GroupResidual] = (),
    mask: Tensor | None = None,
) -> PartialAttention:
    """Rows of many agents against one run of base pages, read once; residuals by sub-range of rows.

    q [Hkv, T, g, D] scaled by 1 / sqrt(D), base_k and base_v [S, Hkv, D], cos_sin [S, D] of the keys' positions in q's
    dtype, mask [T, S] bool (True: hidden).
    """
    num_kv_heads, num_rows, group, _ = q.shape
    rows = (num_kv_heads, num_rows * group)
    scores = _key_scores(q, base_k, residuals)
    k_scales = {r.row_start: r.k_scale for r in residuals if r.k_scale is not None}
    for start, end, added in _residual_scores(q, residuals, cos_sin):
        if start in k_scales:
            scale_scores_(scores[:, start:end], added, k_scales[start])
        scores[:, start:end] += added
    lse, weights = softmax_with_lse(scores, mask[None, :, None] if mask is not None else None, base_v.dtype)
    output = torch.matmul(weights.view(*rows, -1), base_v.transpose(0, 1)).float().view(q.shape)
    for start, end, added in _residual_outputs(weights, residuals):
        output[:, start:end] += added
    return PartialAttention(lse, output)


def _key_scores(q: Tensor, base_k: Tensor, residuals: Sequence[GroupResidual]) -> Tensor:
    """[Hkv, T, g, S] fp32: against the merged K of rows that have one, against base K else."""
    num_kv_heads, num_rows, group, head_dim = q.shape
    merged = [(r.row_start, r.row_end, r.merged_k) for r in residuals if r.merged_k is not None]
    if sum(end - start for start, end, _ in merged) == num_rows:
        scores = torch.empty(num_kv_heads, num_rows, group, len(base_k), dtype=torch.float32, device=q.device)
    else:
        keys = base_k.transpose(0, 1)
        if keys.dtype != torch.float32:
            keys = keys.contiguous()  # oneDNN multiplies a strided bf16 operand three times slower than it copies it
        scores = torch.matmul(q.reshape(num_kv_heads, -1, head_dim), keys.transpose(1, 2)).float().view(*q.shape[:3], -1)
    for start, end, merged_k in merged:
        own = torch.matmul(q[:, start:end].reshape(num_kv_heads, -1, head_dim), merged_k.transpose(1, 2))
        scores[:, start:end] = own.view(num_kv_heads, end - start, group, -1)
    return scores


def _residual_scores(q: Tensor, residuals: Sequence[GroupResidual], cos_sin: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end row, scores [Hkv, rows, g, S] fp32) of every residual on K."""
    built = [r for r in residuals if r.merged_k is None]
    parts = [(r.row_start, r.row_end, r.a_k, r.b_k) for r in built if r.a_k is not None and r.b_k is not None]
    for bounds, a_k, b_k in alike(parts):
        start, end = bounds[0]
        if (end - start) * q.shape[2] > _FOLD_MAX_ROWS:
            for (start, end), a, b in zip(bounds, a_k, b_k, strict=True):
                yield start, end, reconstructed_scores(q[:, start:end], a, b, cos_sin)
            continue
        own_q = torch.stack([q[:, start:end] for start, end in bounds])
        scores = folded_scores(own_q, torch.stack(a_k, dim=1), torch.stack(b_k), cos_sin)
        yield from ((start, end, own) for (start, end), own in zip(bounds, scores, strict=True))


def _residual_outputs(weights: Tensor, residuals: Sequence[GroupResidual]) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end row, (P a_v) B_v [Hkv, rows, g, D] fp32) of every residual on V; weights [Hkv, T, g, S]."""
    parts = [(r.row_start, r.row_end, r.a_v, r.b_v) for r in residuals if r.a_v is not None and r.b_v is not None]
    for bounds, a_v, b_v in alike(parts):
        own = torch.stack([weights[:, start:end] for start, end in bounds])
        recalled = torch.bmm(own.flatten(1, 3), torch.stack(a_v)).view(*own.shape[:4], -1)
        outputs = torch.einsum("ahtgr,arhd->ahtgd", recalled, torch.stack(b_v)).float()
        yield from ((start, end, output) for (start, end), output in zip(bounds, outputs, strict=True))


def alike(
    parts: Sequence[tuple[int, int, Tensor, Tensor]],
) -> Iterator[tuple[list[tuple[int, int]], list[Tensor], list[Tensor]]]:
    """(row bounds, a, b) by equal numbers of rows and equal rank: those can be computed together."""
    groups: dict[tuple[int, int], list[tuple[int, int, Tensor, Tensor]]] = {}
    for part in parts:
        start, end, a, _ = part
        groups.setdefault((end - start, a.shape[1]), []).append(part)
    for group in groups.values():
        yield [(start, end) for start, end, _, _ in group], [a for _, _, a, _ in group], [b for _, _, _, b in group]


def reconstructed_scores(q: Tensor, a_k: Tensor, b_k: Tensor, cos_sin: Tensor) -> Tensor:
    """q . R_j(a_k_j B_k) for every key j, through the rotated residual itself: q [Hkv, T, g, D] rotated, a_k [S, r],
    b_k [r, Hkv, D], cos_sin [S, D] -> [Hkv, T, g, S] fp32."""
    num_kv_heads, _, _, head_dim = q.shape
    delta = torch.matmul(a_k, b_k.flatten(1)).view(-1, num_kv_heads, head_dim)
    rotated = apply_rope(delta, cos_sin.float()).permute(1, 2, 0)
    return torch.matmul(q.reshape(num_kv_heads, -1, head_dim), rotated).float().view(*q.shape[:3], -1)


def folded_scores(q: Tensor, a_k: Tensor, b_k: Tensor, cos_sin: Tensor) -> Tensor:
    """The same for G adapters at once, by folding B into q: q [G, Hkv, T, g, D] rotated, a_k [S, G, r],
    b_k [G, r, Hkv, D], cos_sin [S, D] -> [G, Hkv, T, g, S] fp32.

    One product of the cos|sin table [S, D] with all folded queries [D, G * Hkv * T * g * r], then a dot with a over r.
    8 adapters of rank 16 over 2,048 keys in bf16: 1.5 ms a layer, where one adapter after the other took 6.
    """
    num_adapters, rank = b_k.shape[:2]
    folded = _fold_query(q, b_k).t()
    step = max(1, _FOLD_MAX_ELEMS // folded.shape[1])
    pieces = []
    for table, a in zip(torch.split(cos_sin, step), torch.split(a_k, step), strict=True):
        product = torch.matmul(table, folded).view(len(table), num_adapters, -1, rank)
        pieces.append(torch.matmul(product, a.unsqueeze(-1)).squeeze(-1).float())  # [keys, G, Hkv * T * g]
    return torch.cat(pieces).permute(1, 2, 0).reshape(*q.shape[:4], -1)


def _fold_query(q: Tensor, b_k: Tensor) -> Tensor:
    """[q1 B1 + q2 B2 | q2 B1 - q1 B2] elementwise, per query and rank: [G * Hkv * T * g * r, D] in q's dtype."""
    q1, q2 = q.unsqueeze(4).chunk(2, dim=-1)  # [G, Hkv, T, g, 1, D/2]
    b1, b2 = b_k.transpose(1, 2)[:, :, None, None].chunk(2, dim=-1)  # [G, Hkv, 1, 1, r, D/2]
    return torch.cat((q1 * b1 + q2 * b2, q2 * b1 - q1 * b2), dim=-1).view(-1, q.shape[-1])
