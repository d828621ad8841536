"""Tiles of paged keys under many adapters as ``attend_tiles`` reads them, and what a plain softmax in float64 says of them.

Pools are NaN wherever no tile points, slots lie backwards and apart where they are listed, and factors differ by adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from forkkv_kernels.ops.paged_decode import MERGED_BLOCK, RESIDUAL_FIELDS, TILE_FIELDS, attend_tiles, gather_heads
from torch import Tensor

from tests.kernels.test_rope import table

HKV = 2
K_STRIDE, V_STRIDE = 72, 68  # of the residual pools: the widest rank, then n(k) and its change
UNSET = 7.0


@dataclass(frozen=True)
class Adapter:
    """Ranks on k and v, 0: not targeted. is_scaled: QK-norm's two numbers beside k. is_merged: its whole K is at hand."""

    k_rank: int = 8
    v_rank: int = 8
    is_scaled: bool = False
    is_merged: bool = False


@dataclass(frozen=True)
class Part:
    """Rows [start, end) of a tile read this adapter's residual."""

    start: int
    end: int
    adapter: int


@dataclass(frozen=True)
class Tile:
    """Tokens [first, first + num_keys), read by ``rows``; limits: how many keys each sees."""

    first: int
    num_keys: int
    rows: Sequence[int]
    parts: Sequence[Part] = ()
    limits: Sequence[int] | None = None
    is_listed: bool = False


@dataclass(eq=False)
class Factors:
    """Of one adapter: b [r, HKV, D]; of one part, by token: a [S, r], norm and change [S, HKV], merged_k [S, HKV, D] and
    where the op reads it."""

    k_b: Tensor
    v_b: Tensor
    k_a: Tensor
    v_a: Tensor
    norm: Tensor
    change: Tensor
    merged_k: Tensor
    packed_k: Tensor
    slots: Tensor


@dataclass(eq=False)
class Case:
    """``num_rows`` decode rows among twice as many rows of q, in an order of their own."""

    tiles: Sequence[Tile]
    adapters: Sequence[Adapter] = ()
    num_rows: int = 1
    group: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    seed: int = 0
    parts: dict[tuple[int, int], Factors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self.q = self.random(2 * self.num_rows, HKV * self.group, self.head_dim)
        self.rows = torch.arange(2 * self.num_rows).flip(0)[::2][: self.num_rows].contiguous()
        num_slots = sum(3 * tile.num_keys + 5 for tile in self.tiles)
        self.base_k, self.base_v = (torch.full((num_slots, HKV, self.head_dim), math.nan, dtype=self.dtype) for _ in "kv")
        self.k_pool, self.v_pool = (
            torch.full((num_slots * (1 + len(self.adapters)), stride), math.nan, dtype=self.dtype)
            for stride in (K_STRIDE, V_STRIDE)
        )
        self.cos_sin = table(max(tile.first + tile.num_keys for tile in self.tiles), self.head_dim)
        b = [[self.random(r, HKV, self.head_dim) for r in (a.k_rank, a.v_rank)] for a in self.adapters]
        self.slots: list[Tensor] = []
        next_base = next_own = 3
        for number, tile in enumerate(self.tiles):
            slots, next_base = _slots(tile, next_base)
            self.slots.append(slots)
            for pool in (self.base_k, self.base_v):
                pool[slots] = self.random(tile.num_keys, HKV, self.head_dim)
            for index, part in enumerate(tile.parts):
                slots, next_own = _slots(tile, next_own)
                self.parts[number, index] = self._factors(self.adapters[part.adapter], b[part.adapter], tile, slots)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.dtype)

    def _factors(self, adapter: Adapter, b: list[Tensor], tile: Tile, slots: Tensor) -> Factors:
        num_keys = tile.num_keys
        k_b, v_b = b
        k_a, v_a = ((self.random(num_keys, r) * (0.5 / math.sqrt(max(r, 1)))).to(self.dtype) for r in (len(k_b), len(v_b)))
        norm, change = ((0.2 * self.random(num_keys, HKV) + x).to(self.dtype) for x in (1.0, 0.0))
        merged_k = self.random(num_keys, HKV, self.head_dim)
        self.k_pool[slots, : k_a.shape[1]], self.v_pool[slots, : v_a.shape[1]] = k_a, v_a
        self.k_pool[slots, K_STRIDE - HKV :], self.v_pool[slots, V_STRIDE - HKV :] = norm, change
        return Factors(k_b, v_b, k_a, v_a, norm, change, merged_k, packed(merged_k, tile.first), slots)

    def run(self, tiles: Sequence[int] | None = None) -> Tensor:
        """What the op writes: [num_rows, Hq, D], and that it writes nothing else."""
        kept: list[np.ndarray] = []
        rows = [self._tile_row(number, kept) for number in (range(len(self.tiles)) if tiles is None else tiles)]
        tile_table = np.array(rows, dtype=np.int64).reshape(-1, len(TILE_FIELDS))
        out = torch.full_like(self.q, UNSET)
        attend_tiles(self.q, out, self.rows, self.base_k, self.base_v, self.cos_sin, tile_table.ctypes.data, len(tile_table))
        others = torch.ones(len(out), dtype=torch.bool)
        others[self.rows] = False
        assert (out[others] == UNSET).all()
        return out[self.rows]

    def _tile_row(self, number: int, kept: list[np.ndarray]) -> list[int]:
        tile = self.tiles[number]

        def address(values: Iterable[object]) -> int:
            kept.append(np.array(list(values), dtype=np.int64))
            return kept[-1].ctypes.data

        def located(slots: Tensor) -> tuple[int, int]:
            return (0, address(slots.tolist())) if tile.is_listed else (int(slots[0]) if len(slots) else 0, 0)

        residuals = []
        for index, part in enumerate(tile.parts):
            adapter, factors = self.adapters[part.adapter], self.parts[number, index]
            columns = dict.fromkeys(RESIDUAL_FIELDS, 0)
            columns["row_begin"], columns["row_end"] = part.start, part.end
            columns["slots_first"], columns["slots_listed"] = located(factors.slots)
            for name, pool, b in (("k", self.k_pool, factors.k_b), ("v", self.v_pool, factors.v_b)):
                columns[f"{name}_a"], columns[f"{name}_stride"] = pool.data_ptr(), pool.stride(0)
                columns[f"{name}_rank"], columns[f"{name}_b"] = len(b), b.data_ptr()
            if adapter.is_scaled:
                columns["norm"] = self.k_pool[0, K_STRIDE - HKV :].data_ptr()
                columns["change"] = self.v_pool[0, V_STRIDE - HKV :].data_ptr()
                columns["change_stride"] = V_STRIDE
            if adapter.is_merged:
                columns["merged_k"] = factors.packed_k.data_ptr()
                columns["merged_stride"] = factors.packed_k.stride(0)
            residuals.append(list(columns.values()))
        limits = address(tile.limits) if tile.limits is not None else 0
        base = located(self.slots[number])
        return [
            tile.first,
            tile.num_keys,
            *base,
            len(tile.rows),
            address(tile.rows),
            limits,
            len(residuals),
            address(residuals),
        ]

    def expected(self) -> Tensor:
        """[num_rows, Hq, D] float64."""
        return torch.stack([self._expected_row(row) for row in range(self.num_rows)])

    def _expected_row(self, row: int) -> Tensor:
        keys, values = [], []
        for number, tile in enumerate(self.tiles):
            for index in (i for i, r in enumerate(tile.rows) if r == row):
                seen = tile.limits[index] if tile.limits is not None else tile.num_keys
                k, v = self._keys_and_values(number, index)
                keys.append(k[:seen])
                values.append(v[:seen])
        k, v = (torch.cat(x).repeat_interleave(self.group, dim=1) for x in (keys, values))
        scores = torch.einsum("hd,shd->hs", self.q[self.rows[row]].double(), k) / math.sqrt(self.head_dim)
        return torch.einsum("hs,shd->hd", scores.softmax(dim=-1), v)

    def _keys_and_values(self, number: int, index: int) -> tuple[Tensor, Tensor]:
        """K and V [S, HKV, D] float64 that row ``index`` of a tile reads."""
        tile, slots = self.tiles[number], self.slots[number]
        k, v = self.base_k[slots].double(), self.base_v[slots].double()
        for i, part in enumerate(tile.parts):
            if part.start <= index < part.end:
                adapter, own = self.adapters[part.adapter], self.parts[number, i]
                added = rotated(product(own.k_a, own.k_b), self.cos_sin[tile.first :][: tile.num_keys])
                if adapter.is_scaled:
                    k, added = k * (1 + own.change.double())[..., None], added * own.norm.double()[..., None]
                k, v = own.merged_k.double() if adapter.is_merged else k + added, v + product(own.v_a, own.v_b)
        return k, v


def packed(k: Tensor, first: int) -> Tensor:
    """k [S, H, D] of tokens from ``first`` on, where attention reads whole K; NaN elsewhere. Nothing is written beside it."""
    num_keys, num_heads, head_dim = k.shape
    size = -(-(first + num_keys) // MERGED_BLOCK) * MERGED_BLOCK
    memory = torch.full((num_heads + 2, size, head_dim), math.nan, dtype=k.dtype)
    memory[0] = memory[-1] = UNSET
    zero = torch.zeros(num_keys + 1, num_heads * head_dim, dtype=k.dtype)
    fields = {"num_residual": num_keys, "a": zero.data_ptr(), "stride": 1, "rank": 1, "b": zero.data_ptr()}
    cos_sin = table(first + num_keys + 1, head_dim)[first:].contiguous()
    gather_heads(k, None, (0, 0), num_keys, fields, cos_sin, memory[1:-1], first)
    assert (memory[[0, -1]] == UNSET).all()
    return memory[1:-1]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [S, r], b [r, H, D] -> [S, H, D] float64."""
    return torch.einsum("sr,rhd->shd", a.double(), b.double())


def rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [S, H, D] float64, cos_sin [S, D]."""
    cos, sin = cos_sin.double().unsqueeze(1).chunk(2, dim=-1)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def _slots(tile: Tile, start: int) -> tuple[Tensor, int]:
    """Slots of a tile's tokens from ``start`` on, and the next that is free."""
    if tile.is_listed:
        return start + 2 * torch.arange(tile.num_keys).flip(0), start + 2 * tile.num_keys + 1
    return start + torch.arange(tile.num_keys), start + tile.num_keys + 1
