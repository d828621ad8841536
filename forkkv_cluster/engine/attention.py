"""Attention of one layer over the paged pools, by the step's plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from forkkv_kernels.ops.merged_attention import attend_merged
from forkkv_kernels.ops.paged_decode import is_available
from forkkv_kernels.ops.partial_attention import (
    PartialAttention,
    attend_padded,
    attend_plain,
    empty_partial,
    finish_partial,
    merge_partials_,
)
from forkkv_kernels.ops.qk_norm import KeyScale
from forkkv_kernels.ops.residual_attention import (
    GroupResidual,
    attend,
    attend_grouped,
    reconstruct_k,
    reconstruct_v,
)
from torch import Tensor

from forkkv_cluster.cache.merged_keys import MergedRun, MergedUse
from forkkv_cluster.engine.adapters import AdapterSlots, AdapterWeights
from forkkv_cluster.engine.attention_plan import (
    AttentionPlan,
    DecodeTile,
    ExtendSpan,
    PaddedTiles,
    ResidualPiece,
    Slots,
    TileResidual,
)
from forkkv_cluster.engine.batch import IntArray
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.rotary import RotaryTable
from forkkv_cluster.engine.native_attention import NativeAttention


@dataclass(frozen=True, slots=True, eq=False)
class _LayerResidual:
    """One adapter's residual of one layer at some slots: a_k [S, r_k], b_k [r_k, Hkv, D]; likewise v. None: not targeted.

    k_scale goes with a_k under QK-norm.
    """

    a_k: Tensor | None
    b_k: Tensor | None
    a_v: Tensor | None
    b_v: Tensor | None
    k_scale: KeyScale | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _PaddedTensors:
    """``PaddedTiles`` on the device: rows [n] int64 (None: all decode rows, in order), slots [n * longest] int64, hidden
    [n, longest] bool."""

    rows: Tensor | None
    slots: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, tiles: PaddedTiles, num_rows: int, device: torch.device) -> _PaddedTensors:
        hidden = np.arange(tiles.slots.shape[1]) >= tiles.lengths[:, None]
        slots, is_hidden = (torch.from_numpy(x).to(device) for x in (tiles.slots.reshape(-1), hidden))
        return cls(_rows(tiles.rows, num_rows, device), slots, is_hidden)

    def take(self, pool: Tensor) -> Tensor:
        """pool [slots, Hkv, D] -> [n, longest, Hkv, D]."""
        return pool.index_select(0, self.slots).view(len(self.hidden), -1, *pool.shape[1:])


class Attention(Protocol):
    """A step's attention, layer by layer."""

    def run(self, layer: int, q: Tensor) -> Tensor:
        """q [T, Hq, D] rotated -> [T, Hq, D]. Whatever this layer wrote in this step is visible."""
        ...


def attention_for(plan: AttentionPlan, kv: KVBuffers, adapters: AdapterSlots, rotary: RotaryTable) -> Attention:
    """The fastest there is on this device in this dtype."""
    is_native = is_available(kv.arena.device, kv.arena.dtype)
    return (NativeAttention if is_native else PagedAttention)(plan, kv, adapters, rotary)


class PagedAttention:
    """softmax(q K^T / sqrt(D)) V for every row of a step; K and V come from base and residual pages."""

    def __init__(self, plan: AttentionPlan, kv: KVBuffers, adapters: AdapterSlots, rotary: RotaryTable) -> None:
        self._plan = plan
        self._kv = kv
        self._adapters = adapters
        self._rotary = rotary
        self._written: set[tuple[int, MergedRun, int, int]] = set()
        self._decode_rows = torch.from_numpy(plan.decode_rows).to(kv.arena.device)
        self._tiles = [(tile, *self._tile_tensors(tile)) for tile in plan.tiles]
        self._padded = [_PaddedTensors.of(tiles, len(plan.decode_rows), kv.arena.device) for tiles in plan.padded]

    def run(self, layer: int, q: Tensor) -> Tensor:
        """q [T, Hq, D] rotated -> [T, Hq, D]. Whatever this layer wrote in this step is visible."""
        out = torch.empty_like(q)
        rebuilt: dict[tuple[int, int, bytes, bytes], tuple[Tensor, Tensor]] = {}
        for span in self._plan.extend:
            out[span.row_start : span.row_end] = self._extend(layer, q[span.row_start : span.row_end], span, rebuilt)
        if len(self._decode_rows):
            out[self._decode_rows] = self._decode(layer, q[self._decode_rows]).to(q.dtype)
        return out

    def _extend(
        self, layer: int, q: Tensor, span: ExtendSpan, rebuilt: dict[tuple[int, int, bytes, bytes], tuple[Tensor, Tensor]]
    ) -> Tensor:
        base_k, base_v = (_take(pool, span.slots) for pool in self._kv.base(layer))
        if span.residual is not None:
            if span.residual.key not in rebuilt:
                end = span.residual.end
                rebuilt[span.residual.key] = self._rebuild(layer, base_k[:end], base_v[:end], span.residual)
            k, v = rebuilt[span.residual.key]
            base_k, base_v = (torch.cat((k, base_k[len(k) :])), torch.cat((v, base_v[len(v) :])))
        out: Tensor = attend(q, base_k, base_v)
        return out

    def _rebuild(self, layer: int, base_k: Tensor, base_v: Tensor, piece: ResidualPiece) -> tuple[Tensor, Tensor]:
        residual = self._residual(layer, piece.adapter_slot, piece.slots)
        k, v = base_k, base_v
        if residual.a_k is not None and residual.b_k is not None:
            cos_sin = self._rotary.rows[piece.start : piece.end]
            merged_k = self._merged_k(layer, piece.merged_keys, piece.start, piece.end, base_k, residual)
            if merged_k is None:
                k = reconstruct_k(base_k, residual.a_k, residual.b_k, cos_sin, residual.k_scale)
            else:
                k = merged_k.transpose(0, 1)
        if residual.a_v is not None and residual.b_v is not None:
            v = reconstruct_v(base_v, residual.a_v, residual.b_v)
        return k, v

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        """q [N, Hq, D] of all decode rows -> [N, Hq, D] fp32."""
        geometry = self._kv.geometry
        group = q.shape[1] // geometry.num_kv_heads
        by_head = (q * q.shape[-1] ** -0.5).view(len(q), geometry.num_kv_heads, group, -1).transpose(0, 1)
        state: PartialAttention | None = None
        for part, rows in self._decode_parts(layer, by_head):
            if state is None and rows is None:
                state = part
                continue
            if state is None:
                state = empty_partial(geometry.num_kv_heads, len(q), group, q.shape[-1], q.device)
            merge_partials_(state, part, rows)
        if state is None:
            raise ValueError("decode rows without a tile")
        out: Tensor = finish_partial(state)
        return out

    def _decode_parts(self, layer: int, q: Tensor) -> Iterator[tuple[PartialAttention, Tensor | None]]:
        """q [Hkv, N, g, D] scaled. Attention over each tile, and its rows; None: all, in order."""
        base_k, base_v = self._kv.base(layer)
        for tile, rows, hidden in self._tiles:
            own_q = q if rows is None else q[:, rows]
            k, v = _take(base_k, tile.slots), _take(base_v, tile.slots)
            yield self._attend_tile(layer, tile, own_q, k, v, hidden), rows
        for padded in self._padded:
            own_q = q if padded.rows is None else q[:, padded.rows]
            yield attend_padded(own_q, padded.take(base_k), padded.take(base_v), padded.hidden), padded.rows

    def _attend_tile(
        self, layer: int, tile: DecodeTile, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None
    ) -> PartialAttention:
        if not tile.residuals:
            plain: PartialAttention = attend_plain(q, k, v, hidden)
            return plain
        residuals = [self._group_residual(layer, tile, residual, k) for residual in tile.residuals]
        merged: PartialAttention | None = attend_merged(q, v, residuals, hidden)
        if merged is not None:
            return merged
        grouped: PartialAttention = attend_grouped(q, k, v, self._rotary.compact[tile.start : tile.end], residuals, hidden)
        return grouped

    def _group_residual(self, layer: int, tile: DecodeTile, part: TileResidual, base_k: Tensor) -> GroupResidual:
        weights, use = self._adapters[part.adapter_slot], part.merged_keys
        if use is not None and use.is_written and weights.layers[layer].k is not None:
            merged_k: Tensor | None = self._kv.merged_keys(layer, use.run)[:, tile.start : tile.end]
            a_k = b_k = scale = None  # nothing of K is left to be built
            a_v, b_v = self._factors(layer, weights, part.slots, 1)
        else:
            residual = self._residual(layer, part.adapter_slot, part.slots)
            merged_k = self._merged_k(layer, use, tile.start, tile.end, base_k, residual)
            a_k, b_k, a_v, b_v, scale = residual.a_k, residual.b_k, residual.a_v, residual.b_v, residual.k_scale
        return GroupResidual(part.row_start, part.row_end, a_k, b_k, a_v, b_v, scale, merged_k)

    def _merged_k(
        self, layer: int, use: MergedUse | None, start: int, end: int, base_k: Tensor, residual: _LayerResidual
    ) -> Tensor | None:
        """The adapter's K of tokens [start, end), whose base K is ``base_k`` [S, Hkv, D]: [Hkv, S, D], a view of the borrowed
        memory, written here if this step is the first to use it. None where K is to be built without."""
        if use is None or residual.a_k is None or residual.b_k is None:
            return None
        merged_k: Tensor = self._kv.merged_keys(layer, use.run)[:, start:end]
        written = (layer, use.run, start, end)
        if not use.is_written and written not in self._written:
            cos_sin = self._rotary.rows[start:end]
            merged_k.copy_(reconstruct_k(base_k, residual.a_k, residual.b_k, cos_sin, residual.k_scale).transpose(0, 1))
            self._written.add(written)
        return merged_k

    def _residual(self, layer: int, adapter_slot: int, slots: Slots) -> _LayerResidual:
        weights = self._adapters[adapter_slot]
        lora, geometry = weights.layers[layer], self._kv.geometry
        if weights.residual_rank == 0:
            return _LayerResidual(None, None, None, None)
        (a_k, b_k), (a_v, b_v) = (self._factors(layer, weights, slots, plane) for plane in (0, 1))
        pools = self._kv.residual(layer, geometry.rank_class(weights.residual_rank))
        scale = None
        if lora.has_key_scale:
            scale = KeyScale(*(_take(columns, slots) for columns in lora.key_scale_columns(pools, geometry.num_kv_heads)))
        return _LayerResidual(a_k, b_k, a_v, b_v, scale)

    def _factors(self, layer: int, weights: AdapterWeights, slots: Slots, plane: int) -> tuple[Tensor | None, Tensor | None]:
        """a [S, r] at ``slots`` and b [r, Hkv, D] of k (plane 0) or v (plane 1); None twice where it is not targeted."""
        lora, geometry = weights.layers[layer], self._kv.geometry
        part = (lora.k, lora.v)[plane]
        if part is None:
            return None, None
        pool = self._kv.residual(layer, geometry.rank_class(weights.residual_rank))[plane]
        return _take(pool[:, : part.rank], slots), part.shared_b.view(part.rank, geometry.num_kv_heads, geometry.head_dim)

    def _tile_tensors(self, tile: DecodeTile) -> tuple[Tensor | None, Tensor | None]:
        device = self._kv.arena.device
        hidden = torch.from_numpy(tile.hidden).to(device) if tile.hidden is not None else None
        return _rows(tile.rows, len(self._plan.decode_rows), device), hidden


def _rows(rows: IntArray, num_rows: int, device: torch.device) -> Tensor | None:
    """rows [n] on the device; None when they are all ``num_rows``, in order, and need no gathering."""
    if len(rows) == num_rows and (rows == np.arange(num_rows)).all():
        return None
    return torch.from_numpy(rows).to(device)


def _take(pool: Tensor, slots: Slots) -> Tensor:
    """Rows of a pool: a view where the slots are consecutive, a copy where they are not."""
    if isinstance(slots, slice):
        return pool[slots]
    return pool.index_select(0, torch.from_numpy(slots).to(pool.device))
