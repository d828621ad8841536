"""Attention of rows that follow what is cached, over base pages and residual pages, sequence by sequence in float64.

Symbols: N sequences, T packed rows, Hq query heads, Hkv kv heads, g = Hq / Hkv, D head dim, W = Hkv * D, P and PR pages of a
sequence, A adapter slots, R the stacks' rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forkkv_kernels.reference.residuals import Residuals


@dataclass(frozen=True, slots=True, eq=False)
class ExtendRows:
    """Which rows there are and where their keys lie, int32: rows [query_starts[n], query_starts[n + 1]) of T are sequence n's,
    at positions start_pos[n] and on; rows behind query_starts[N] are nobody's. base_pages [N, P], garbage beyond a sequence's
    last key."""

    query_starts: Tensor
    start_pos: Tensor
    base_pages: Tensor
    page_size: int
    num_kv_heads: int


def residual_attention_extend(
    q: Tensor, k_plane: Tensor, v_plane: Tensor, rows: ExtendRows, scale: float, residuals: Residuals | None = None
) -> Tensor:
    """-> [T, Hq, D] in q's dtype, zeros in rows that are nobody's."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts = rows.query_starts.tolist()
    for n, start_pos in enumerate(rows.start_pos.tolist()):
        own = q[starts[n] : starts[n + 1]].double()
        if len(own):
            positions = torch.arange(start_pos + len(own), device=q.device)
            k, v = _base_kv(k_plane, v_plane, rows, n, positions, q.shape[2])
            if residuals is not None and residuals.adapters[n] >= 0:
                _add_residual_(k, v, k_plane, v_plane, rows.page_size, residuals, n)
            out[starts[n] : starts[n + 1]] = _attend(own, k, v, scale).to(q.dtype)
    return out


def _base_kv(
    k_plane: Tensor, v_plane: Tensor, rows: ExtendRows, n: int, positions: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """K and V as their pages hold them, [positions, Hkv, D] float64."""
    slots = _slots(rows.base_pages[n], positions, rows.page_size)
    k, v = (_rows_of(plane, rows.num_kv_heads * head_dim)[slots].double() for plane in (k_plane, v_plane))
    return k.unflatten(1, (rows.num_kv_heads, head_dim)), v.unflatten(1, (rows.num_kv_heads, head_dim))


def _add_residual_(
    k: Tensor, v: Tensor, k_plane: Tensor, v_plane: Tensor, page_size: int, residuals: Residuals, n: int
) -> None:
    """K = Kb + R(a_k B_k), with QK-norm (1 + change) Kb + norm R(a_k B_k); V = Vb + a_v B_v."""
    adapter = int(residuals.adapters[n])
    length = min(int(residuals.lens[n]), len(k))
    rank_k, rank_v = residuals.ranks[adapter].tolist()
    slots = _slots(residuals.pages[n], torch.arange(length, device=k.device), page_size)
    width = int(residuals.rank_class[adapter])
    own_k, own_v = (_rows_of(plane, width)[slots].double() for plane in (k_plane, v_plane))
    added = torch.einsum("sr,rhd->shd", own_k[:, :rank_k], residuals.b_k[adapter, :rank_k].double())
    cos, sin = residuals.cos_sin[:length].double().unsqueeze(1).chunk(2, dim=-1)
    added1, added2 = added.chunk(2, dim=-1)
    added = torch.cat((added1 * cos - added2 * sin, added2 * cos + added1 * sin), dim=-1)
    if residuals.norm_column is not None and residuals.change_column is not None and residuals.norm_column[adapter] >= 0:
        norm, change = (
            own[:, int(column[adapter]) :][:, : k.shape[1], None]
            for own, column in ((own_k, residuals.norm_column), (own_v, residuals.change_column))
        )
        k[:length] *= 1 + change
        added = added * norm
    k[:length] += added
    v[:length] += torch.einsum("sr,rhd->shd", own_v[:, :rank_v], residuals.b_v[adapter, :rank_v].double())


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [T, Hq, D], the last T of S positions; k and v [S, Hkv, D] -> [T, Hq, D]."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("thgd,shd->hgts", grouped, k) * scale
    hidden = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hgts,shd->thgd", weights, v).flatten(1, 2)


def _rows_of(plane: Tensor, width: int) -> Tensor:
    return plane[: len(plane) // width * width].view(-1, width)


def _slots(pages: Tensor, positions: Tensor, page_size: int) -> Tensor:
    return pages[positions // page_size].long() * page_size + positions % page_size
