"""x A_k and x A_v of rows that write a residual, from the shrink that their LoRA needs anyway, to their slots; on a model with
QK-norm the numbers beside them that rescale K (``reference.qk_norm``).

A residual slot s of an adapter whose residual is c wide (its rank class) holds elements [s c, s c + c) of each plane:

    k_plane: x A_k in columns [0, r_k), and n(k) of each kv head from norm_column on
    v_plane: x A_v in columns [0, r_v), and the change c of each kv head from change_column on

Symbols: S, E, M, R, A as in ``reference.lora_tiles``, Hkv kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forkkv_kernels.reference.lora_tiles import LoraTiles
from forkkv_kernels.reference.qk_norm import inverse_rms


@dataclass(frozen=True, slots=True, eq=False)
class ResidualTables:
    """slots [E] int32 or int64: where entry e goes, -1 for nowhere; ranks [A, 2] int32: r_k and r_v, 0 where not targeted, rows
    may be strided; widths [A] int32: the rank class."""

    slots: Tensor
    ranks: Tensor
    widths: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KeyScaleTables:
    """k [T, Hkv, D] before its norm and without LoRA, rows may be strided; b [A, R, Hkv * D] of k without the norm's weight, a
    view of ``LoraStacks.b`` will do; norm_columns and change_columns [A] int32, -1: no scale."""

    k: Tensor
    b: Tensor
    norm_columns: Tensor
    change_columns: Tensor
    eps: float


def store_residuals(
    shrunk: Tensor, tiles: LoraTiles, tables: ResidualTables, scale: KeyScaleTables | None, k_plane: Tensor, v_plane: Tensor
) -> None:
    """shrunk [S, E, M, R] fp32, k and v its last two modules; k_plane, v_plane: one layer's planes, 1-D, written in place."""
    sums = shrunk.sum(dim=0).to(k_plane.dtype)
    for adapter, first, count in tiles.table.tolist():
        if adapter < 0:
            continue
        entries = torch.arange(first, first + count, device=shrunk.device)
        entries = entries[tables.slots[entries] >= 0]
        slots, width = tables.slots[entries].long(), int(tables.widths[adapter])
        ranks = tables.ranks[adapter].tolist()
        for plane, module, rank in zip((k_plane, v_plane), (-2, -1), ranks, strict=True):
            _rows(plane, width)[slots, :rank] = sums[entries, module, :rank]
        if scale is not None and scale.norm_columns[adapter] >= 0:
            a_k = sums[entries, -2, : ranks[0]]
            norm, change = _key_scale(scale, tiles.rows[entries].long(), a_k, scale.b[adapter, : ranks[0]])
            num_heads = scale.k.shape[1]
            for plane, columns, part in ((k_plane, scale.norm_columns, norm), (v_plane, scale.change_columns, change)):
                start = int(columns[adapter])
                _rows(plane, width)[slots, start : start + num_heads] = part.to(plane.dtype)


def _rows(plane: Tensor, width: int) -> Tensor:
    """[slots, width], a view."""
    return plane[: len(plane) // width * width].view(-1, width)


def _key_scale(scale: KeyScaleTables, rows: Tensor, a_k: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """n(k) and c [n, Hkv] in fp32."""
    base = scale.k[rows].float()
    whole = base + (a_k.float() @ b.float()).view(base.shape)
    norm = inverse_rms(whole, scale.eps)
    return norm, norm / inverse_rms(base, scale.eps) - 1.0
