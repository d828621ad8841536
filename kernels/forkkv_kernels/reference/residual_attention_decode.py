"""Decode over base pages and residual pages, sequence by sequence and head by head in float64.

Symbols: N sequences of one query row, Hq query heads, Hkv kv heads, g = Hq / Hkv, D head dim, W = Hkv * D, P and PR pages of a
sequence, A adapter slots, R the stacks' rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forkkv_kernels.reference.combine_partials import Partials
from forkkv_kernels.reference.residuals import Residuals


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """Which keys a sequence's row sees: positions [kv_starts[n], kv_lens[n]), kv_starts None: from 0 on. base_pages [N, P] from
    position 0 on, garbage beyond kv_lens and before kv_starts. Tables int32."""

    base_pages: Tensor
    kv_lens: Tensor
    page_size: int
    num_kv_heads: int
    kv_starts: Tensor | None = None


def residual_attention_decode(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: DecodeRows,
    scale: float,
    partials: Partials,
    splits: range,
    residuals: Residuals | None = None,
) -> None:
    """All of it into the first of ``splits``; the others are left without a key."""
    starts = [0] * len(q) if rows.kv_starts is None else rows.kv_starts.tolist()
    partials.lse[:, :, splits.start : splits.stop] = -torch.inf
    for n, (start, end) in enumerate(zip(starts, rows.kv_lens.tolist(), strict=True)):
        if start < end:
            k, v = base_kv(k_plane, v_plane, rows.base_pages[n], start, end, rows.page_size, rows.num_kv_heads, q.shape[2])
            adapter = -1 if residuals is None else int(residuals.adapters[n])
            if residuals is not None and adapter >= 0:
                covered = min(int(residuals.lens[n]), end)
                add_residual_(k, v, k_plane, v_plane, residuals, residuals.pages[n], adapter, start, covered, rows.page_size)
            attend_row_(partials, n, splits.start, q[n], k, v, scale)


def base_kv(
    k_plane: Tensor, v_plane: Tensor, pages: Tensor, start: int, end: int, page_size: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """K and V of positions [start, end) as their pages hold them, [positions, Hkv, D] float64."""
    slots = _slots(pages, start, end, page_size)
    width = num_kv_heads * head_dim
    usable = len(k_plane) // width * width
    k, v = (plane[:usable].view(-1, num_kv_heads, head_dim)[slots].double() for plane in (k_plane, v_plane))
    return k, v


def add_residual_(
    k: Tensor, v: Tensor, k_plane: Tensor, v_plane: Tensor, residuals: Residuals, pages: Tensor, adapter: int,
    start: int, end: int, page_size: int,
) -> None:  # fmt: skip
    """Add what ``adapter`` adds at positions [start, end) to the first of k and v [positions, Hkv, D], which begin at start."""
    if start >= end:
        return
    count, rank_class = end - start, int(residuals.rank_class[adapter])
    rank_k, rank_v = residuals.ranks[adapter].tolist()
    slots = _slots(pages, start, end, page_size)
    rows_k, rows_v = (p[: len(p) // rank_class * rank_class].view(-1, rank_class)[slots].double() for p in (k_plane, v_plane))
    v[:count] += torch.einsum("sr,rhd->shd", rows_v[:, :rank_v], residuals.b_v[adapter, :rank_v].double())
    if rank_k == 0:
        return
    y1, y2 = torch.einsum("sr,rhd->shd", rows_k[:, :rank_k], residuals.b_k[adapter, :rank_k].double()).chunk(2, dim=-1)
    cos, sin = residuals.cos_sin[start:end].double().unsqueeze(1).chunk(2, dim=-1)
    rotated = torch.cat((y1 * cos - y2 * sin, y2 * cos + y1 * sin), dim=-1)
    if residuals.norm_column is not None and residuals.change_column is not None:
        heads = k.shape[1]
        norm_column, change_column = int(residuals.norm_column[adapter]), int(residuals.change_column[adapter])
        k[:count] *= 1 + rows_v[:, change_column : change_column + heads].unsqueeze(-1)
        rotated *= rows_k[:, norm_column : norm_column + heads].unsqueeze(-1)
    k[:count] += rotated


def attend_row_(partials: Partials, n: int, split: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """q [Hq, D], k and v [positions, Hkv, D] float64, into one split of row n."""
    group = q.shape[0] // k.shape[1]
    for head in range(q.shape[0]):
        scores = scale * (k[:, head // group] @ q[head].double())
        partials.lse[n, head, split] = torch.logsumexp(scores, dim=0).float()
        partials.out[n, head, split] = (torch.softmax(scores, dim=0) @ v[:, head // group]).float()


def _slots(pages: Tensor, start: int, end: int, page_size: int) -> Tensor:
    positions = torch.arange(start, end, device=pages.device)
    return pages[positions // page_size].long() * page_size + positions % page_size
