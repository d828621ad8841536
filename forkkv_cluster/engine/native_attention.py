"""A step's attention as tables of addresses, for ``forkkv_kernels.ops.paged_decode``: one call for a layer's decode rows, and
K and V of extend spans head by head without a copy in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from forkkv_kernels.ops.paged_decode import RESIDUAL_FIELDS, TILE_FIELDS, attend_tiles, gather_heads
from forkkv_kernels.ops.residual_attention import attend_heads
from torch import Tensor

from forkkv_cluster.cache.merged_keys import MergedRun
from forkkv_cluster.engine.adapter_tables import RESIDUAL_COLUMNS, Table
from forkkv_cluster.engine.adapters import AdapterSlots
from forkkv_cluster.engine.attention_plan import AttentionPlan, DecodeTile, ExtendSpan, Slots, TileResidual
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.rotary import RotaryTable

_TILE = {name: column for column, name in enumerate(TILE_FIELDS)}
_RESIDUAL = {name: column for column, name in enumerate(RESIDUAL_FIELDS)}
_FACTOR = {name: column for column, name in enumerate(RESIDUAL_COLUMNS)}


class _Addresses:
    """Addresses of slots, and of what a residual is read from, in every layer."""

    def __init__(self, kv: KVBuffers, adapters: AdapterSlots) -> None:
        self._kv = kv
        self._adapters = adapters
        self._kept: list[np.ndarray] = []
        self._plane_bytes = kv.arena.stride(1) * kv.arena.itemsize
        self._layers = np.arange(kv.geometry.num_layers, dtype=np.int64)

    def of(self, array: np.ndarray) -> int:
        """Address of an int64 array [n], which is kept as long as this object lives."""
        self._kept.append(np.ascontiguousarray(array, dtype=np.int64))
        return self._kept[-1].ctypes.data

    def slots(self, slots: Slots) -> tuple[int, int]:
        """First slot and the address of all, 0 where they are consecutive."""
        return (slots.start, 0) if isinstance(slots, slice) else (0, self.of(slots))

    def plane(self, plane: int) -> Table:
        """[L]: K (0) or V (1) of every layer."""
        start: Table = self._kv.arena.data_ptr() + (2 * self._layers + plane) * self._plane_bytes
        return start

    def residual(self, adapter_slot: int) -> Table:
        """[L, RESIDUAL_FIELDS] of an adapter's factors; rows, slots and merged K are left to the caller."""
        weights, geometry = self._adapters[adapter_slot], self._kv.geometry
        table = np.zeros((len(self._layers), len(_RESIDUAL)), dtype=np.int64)
        if weights.residual_rank == 0:
            return table
        factors = self._adapters.tables(adapter_slot).residual
        rank_class, size = geometry.rank_class(weights.residual_rank), self._kv.arena.itemsize
        for number, plane in enumerate(("k", "v")):
            table[:, _RESIDUAL[f"{plane}_a"]] = self.plane(number)
            table[:, _RESIDUAL[f"{plane}_stride"]] = rank_class
            table[:, _RESIDUAL[f"{plane}_rank"]] = factors[:, _FACTOR[f"{plane}_rank"]]
            table[:, _RESIDUAL[f"{plane}_b"]] = factors[:, _FACTOR[f"{plane}_b"]]
        for number, name in enumerate(("norm", "change")):
            column = factors[:, _FACTOR[f"{name}_column"]]
            table[:, _RESIDUAL[name]] = np.where(column < 0, 0, self.plane(number) + column * size)
        table[:, _RESIDUAL["change_stride"]] = rank_class
        return table

    def merged_keys(self, run: MergedRun) -> Table:
        """[L]: an adapter's whole K in borrowed slabs."""
        start: Table = self.plane(run.plane) + run.first_slab * self._kv.geometry.slab_elems * self._kv.arena.itemsize
        return start


class NativeAttention:
    """As ``PagedAttention``, on the ops of ``paged_decode``."""

    def __init__(self, plan: AttentionPlan, kv: KVBuffers, adapters: AdapterSlots, rotary: RotaryTable) -> None:
        self._kv = kv
        self._rotary = rotary
        self._addresses = _Addresses(kv, adapters)
        self._decode_rows = torch.from_numpy(plan.decode_rows)
        tiles = [*plan.tiles, *(tile for padded in plan.padded for tile in padded.tiles)]
        parts = [(tile, residual) for tile in tiles for residual in tile.residuals]
        self._residuals = self._residual_table(parts)
        self._tiles = self._tile_table(tiles)
        self._unwritten = [
            (number, _Unwritten(r.merged_keys.run, tile.start, tile.end, self._addresses.slots(tile.slots)))
            for number, (tile, r) in enumerate(parts)
            if r.merged_keys is not None and not r.merged_keys.is_written
        ]
        self._written: set[tuple[int, MergedRun, int, int]] = set()
        self._spans = [_Span(span, self._addresses) for span in plan.extend]
        longest = max((span.kv_len for span in plan.extend), default=0)
        self._heads = kv.arena.new_empty(2, kv.geometry.num_kv_heads * longest * kv.geometry.head_dim)

    def run(self, layer: int, q: Tensor) -> Tensor:
        """q [T, Hq, D] rotated, contiguous -> [T, Hq, D]. Whatever this layer wrote in this step is visible."""
        out = torch.empty_like(q)
        for span in self._spans:
            rows = span.rows
            out[rows] = self._extend(layer, q[rows], span)
        if len(self._decode_rows):
            for number, unwritten in self._unwritten:
                self._write_merged(layer, unwritten, self._residuals[layer, number])
            base_k, base_v = self._kv.base(layer)
            table = self._tiles[layer]
            attend_tiles(q, out, self._decode_rows, base_k, base_v, self._rotary.rows, table.ctypes.data, len(table))
        return out

    def _extend(self, layer: int, q: Tensor, span: _Span) -> Tensor:
        geometry = self._kv.geometry
        shape = (geometry.num_kv_heads, span.kv_len, geometry.head_dim)
        keys, values = (plane[: math.prod(shape)].view(shape) for plane in self._heads)
        base_k, base_v = self._kv.base(layer)
        cos_sin = self._rotary.rows[: span.kv_len]
        merged_k = self._unwritten_k(layer, span.unwritten) if span.unwritten is not None else None
        gather_heads(base_k, keys, span.slots, span.kv_len, span.factors(layer, "k"), cos_sin, merged_k)
        gather_heads(base_v, values, span.slots, span.kv_len, span.factors(layer, "v"))
        out: Tensor = attend_heads(q, keys, values)
        return out

    def _write_merged(self, layer: int, part: _Unwritten, residual: Table) -> None:
        """An adapter's K of some tokens into borrowed slabs, for this and all later steps."""
        target = self._unwritten_k(layer, part)
        if target is None or not residual[_RESIDUAL["k_rank"]]:
            return
        base_k, _ = self._kv.base(layer)
        num_tokens = part.end - part.start
        factors = _gather_fields(residual, "k", num_tokens)
        cos_sin = self._rotary.rows[part.start : part.end]
        gather_heads(base_k, None, part.slots, num_tokens, factors, cos_sin, target, part.start)

    def _unwritten_k(self, layer: int, part: _Unwritten) -> Tensor | None:
        """Where to write it, None where this step has done so already."""
        written = (layer, part.run, part.start, part.end)
        if written in self._written:
            return None
        self._written.add(written)
        return self._kv.merged_blocks(layer, part.run)

    def _residual_table(self, parts: Sequence[tuple[DecodeTile, TileResidual]]) -> Table:
        """[L, n, RESIDUAL_FIELDS]"""
        tables = [self._residual_rows(tile, residual) for tile, residual in parts]
        empty = np.zeros((self._kv.geometry.num_layers, 0, len(_RESIDUAL)), dtype=np.int64)
        return np.ascontiguousarray(np.stack(tables, axis=1)) if tables else empty

    def _residual_rows(self, tile: DecodeTile, residual: TileResidual) -> Table:
        table = self._addresses.residual(residual.adapter_slot)
        first, listed = self._addresses.slots(residual.slots)
        table[:, : _RESIDUAL["k_a"]] = (residual.row_start, residual.row_end, first, listed)
        if residual.merged_keys is not None:
            run = residual.merged_keys.run
            start = self._addresses.merged_keys(run)
            table[:, _RESIDUAL["merged_k"]] = np.where(table[:, _RESIDUAL["k_rank"]] > 0, start, 0)
            table[:, _RESIDUAL["merged_stride"]] = self._kv.merged_blocks(0, run).stride(0)
        return table

    def _tile_table(self, tiles: Sequence[DecodeTile]) -> Table:
        """[L, n, TILE_FIELDS]"""
        table = np.zeros((self._kv.geometry.num_layers, len(tiles), len(_TILE)), dtype=np.int64)
        number = 0
        for index, tile in enumerate(tiles):
            limits = self._addresses.of((~tile.hidden).sum(axis=1)) if tile.hidden is not None else 0
            table[:, index, : _TILE["residuals"]] = (
                tile.start, tile.end - tile.start, *self._addresses.slots(tile.slots), len(tile.rows),
                self._addresses.of(tile.rows), limits, len(tile.residuals),
            )  # fmt: skip
            for layer, rows in enumerate(self._residuals):
                table[layer, index, _TILE["residuals"]] = rows.ctypes.data + number * rows.strides[0]
            number += len(tile.residuals)
        return table


@dataclass(frozen=True, slots=True)
class _Unwritten:
    """An adapter's whole K over the tokens [start, end), which this step writes; base K at ``slots``."""

    run: MergedRun
    start: int
    end: int
    slots: tuple[int, int]


class _Span:
    """An extend span as addresses."""

    def __init__(self, span: ExtendSpan, addresses: _Addresses) -> None:
        self.rows = slice(span.row_start, span.row_end)
        self.kv_len = span.kv_len
        self.slots = addresses.slots(span.slots)
        piece = span.residual
        self._num_residual = piece.end if piece is not None else 0
        self.unwritten: _Unwritten | None = None
        self._factors: Table | None = None
        if piece is not None:
            use = piece.merged_keys
            if use is not None and not use.is_written:
                self.unwritten = _Unwritten(use.run, 0, piece.end, self.slots)
            self._factors = addresses.residual(piece.adapter_slot)
            self._factors[:, _RESIDUAL["slots_first"] : _RESIDUAL["k_a"]] = addresses.slots(piece.slots)

    def factors(self, layer: int, plane: str) -> dict[str, int]:
        """The fields of a ``Gather`` for K or V; none without a residual."""
        return _gather_fields(self._factors[layer], plane, self._num_residual) if self._factors is not None else {}


def _gather_fields(residual: Table, plane: str, num_residual: int) -> dict[str, int]:
    """residual [RESIDUAL_FIELDS] -> the residual's fields of a ``Gather`` over so many tokens."""
    names = {"residual_first": "slots_first", "residual_listed": "slots_listed"}
    names |= {name: f"{plane}_{name}" for name in ("a", "stride", "rank", "b")}
    if plane == "k":
        names |= {name: name for name in ("norm", "change", "change_stride")}
    return {"num_residual": num_residual} | {field: int(residual[_RESIDUAL[name]]) for field, name in names.items()}
