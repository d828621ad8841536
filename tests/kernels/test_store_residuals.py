"""Residual KV into its slots, and beside it what rescales K under QK-norm. Planes are NaN where nothing may be written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from forkkv_kernels.ops.lora_tiles import LoraTiles, tile_table
from forkkv_kernels.ops.store_residuals import KeyScaleTables, ResidualTables, store_residuals
from forkkv_kernels.reference.qk_norm import inverse_rms, key_scale
from torch import Tensor

from tests.kernels.place_sets import DOT_PLACES, REFERENCE
from tests.kernels.places import Place

RANKS = [[8, 3], [0, 16], [16, 0], [1, 1], [8, 8]]
WIDTHS = [8, 16, 16, 8, 32]
SEGMENTS = [(0, 0, 5), (2, 5, 25), (-1, 25, 27), (1, 27, 28), (3, 28, 31)]
"""(adapter, first entry, end of its entries); adapter 4 has none."""
NUM_ENTRIES, NUM_SLOTS = 33, 40
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Written:
    k_plane: Tensor
    v_plane: Tensor

    def rows(self, width: int) -> tuple[Tensor, Tensor]:
        """[slots, width], views."""
        return self.k_plane.view(-1, width), self.v_plane.view(-1, width)


def filled(place: Place, *shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(place.device, place.dtype)


def ints(place: Place, values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=place.device)


def slot_of(entry: int, width: int) -> int:
    """Distinct elements for entries of all widths; -1 for some."""
    return -1 if entry % 7 == 3 else (entry * 32) // width


def tables_of(place: Place, slot_dtype: torch.dtype = torch.int64) -> tuple[LoraTiles, ResidualTables]:
    widths = {e: WIDTHS[adapter] for adapter, begin, end in SEGMENTS if adapter >= 0 for e in range(begin, end)}
    slots = torch.tensor([slot_of(e, widths[e]) if e in widths else 39 for e in range(NUM_ENTRIES)], dtype=slot_dtype)
    rows = torch.randperm(NUM_ENTRIES, generator=torch.Generator().manual_seed(5)).int()
    tiles = LoraTiles(tile_table(SEGMENTS, 16, 8).to(place.device), rows.to(place.device), 16)
    strided = ints(place, [[9, *ranks] for ranks in RANKS])[:, 1:]
    return tiles, ResidualTables(slots.to(place.device), strided, ints(place, WIDTHS))


def partial_sums(place: Place, num_splits: int, num_modules: int = 3, rank: int = 16) -> Tensor:
    """NaN beyond each rank, and everywhere in q's columns, which are not read."""
    shrunk = torch.randn(num_splits, NUM_ENTRIES, num_modules, rank, generator=torch.Generator().manual_seed(6))
    shrunk[:, :, :-2] = math.nan
    for adapter, begin, end in SEGMENTS:
        for module, limit in zip((-2, -1), RANKS[adapter] if adapter >= 0 else (0, 0), strict=True):
            shrunk[:, begin:end, module, limit:] = math.nan
    return shrunk.to(place.device)


def store(place: Place, shrunk: Tensor, tiles: LoraTiles, tables: ResidualTables, scale: KeyScaleTables | None) -> Written:
    planes = [torch.full((NUM_SLOTS * 32,), math.nan, dtype=place.dtype, device=place.device) for _ in "kv"]
    with place.entered():
        store_residuals(shrunk, tiles, tables, scale, *planes)
    return Written(*planes)


def stored_entries() -> list[tuple[int, int]]:
    """(entry, adapter) of those with a slot."""
    return [(e, a) for a, begin, end in SEGMENTS if a >= 0 for e in range(begin, end) if slot_of(e, WIDTHS[a]) >= 0]


@pytest.mark.parametrize("place", [REFERENCE, *DOT_PLACES])
@pytest.mark.parametrize(("num_splits", "num_modules"), [(1, 3), (5, 2)])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_columns_within_the_rank_are_written_and_nothing_else(
    place: Place, num_splits: int, num_modules: int, slot_dtype: torch.dtype
) -> None:
    tiles, tables = tables_of(place, slot_dtype)
    shrunk = partial_sums(place, num_splits, num_modules)
    found = store(place, shrunk, tiles, tables, None)
    wanted = Written(*(torch.full_like(plane, math.nan) for plane in (found.k_plane, found.v_plane)))
    sums = shrunk.double().sum(dim=0)
    for entry, adapter in stored_entries():
        for plane, module, rank in zip(wanted.rows(WIDTHS[adapter]), (-2, -1), RANKS[adapter], strict=True):
            plane[slot_of(entry, WIDTHS[adapter]), :rank] = sums[entry, module, :rank].to(place.dtype)
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[place.dtype]
    for one, other in ((found.k_plane, wanted.k_plane), (found.v_plane, wanted.v_plane)):
        assert torch.equal(one.isnan(), other.isnan())
        torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("place", [REFERENCE, *DOT_PLACES])
@pytest.mark.parametrize(("num_kv_heads", "head_dim", "stack_rank"), [(1, 16, 16), (4, 80, 64), (3, 40, 16)])
def test_key_scales_stand_behind_the_residual(place: Place, num_kv_heads: int, head_dim: int, stack_rank: int) -> None:
    """Against ``key_scale``, from the a_k that was written. Adapter 4 is the one whose slots have room for scales."""
    segments = [(4, 0, 20), (2, 20, 24)]
    tiles = LoraTiles(tile_table(segments, 16, 4).to(place.device), torch.randperm(33).int().to(place.device), 16)
    slots = torch.arange(NUM_ENTRIES).where(torch.arange(NUM_ENTRIES) % 5 != 2, -1).to(place.device)
    columns = ints(place, [-1, -1, -1, -1, 8]), ints(place, [-1, -1, -1, -1, 9])
    tables = ResidualTables(slots, ints(place, RANKS), ints(place, [8, 16, 32, 8, 32]))
    shrunk = torch.randn(2, NUM_ENTRIES, 2, stack_rank, generator=torch.Generator().manual_seed(7)).to(place.device)
    shrunk[:, :20, :, 8:] = math.nan
    qkv = filled(place, NUM_ENTRIES, 3 * num_kv_heads, head_dim, seed=8)
    k = qkv[:, num_kv_heads : 2 * num_kv_heads]
    b = filled(place, len(RANKS), stack_rank, 3 * num_kv_heads * head_dim, seed=9) / 3
    b[4, 8:] = math.nan
    b_k = b[:, :, num_kv_heads * head_dim : 2 * num_kv_heads * head_dim]
    found = store(place, shrunk, tiles, tables, KeyScaleTables(k, b_k, *columns, EPS))

    rows = tiles.rows[:20].long()
    is_kept = slots[:20] >= 0
    k_rows, v_rows = (plane[slots[:20][is_kept]] for plane in found.rows(32))
    base = k[rows][is_kept].double()
    wanted = key_scale(base, inverse_rms(base, EPS).double(), k_rows[:, :8].double(), b_k[4, :8].double(), EPS)
    norm, change = k_rows[:, 8 : 8 + num_kv_heads], v_rows[:, 9 : 9 + num_kv_heads]
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[place.dtype]
    torch.testing.assert_close(norm.float(), wanted.norm.float(), rtol=tolerance, atol=0)
    torch.testing.assert_close(change.float(), wanted.change.float(), rtol=tolerance, atol=tolerance)
    others = [plane[slots[20:24][slots[20:24] >= 0]] for plane in found.rows(32)]
    assert others[0][:, 16:].isnan().all()  # an adapter without scales
    assert others[1].isnan().all()
    assert k_rows[:, 8 + num_kv_heads :].isnan().all()
    assert v_rows[:, 8].isnan().all()


def test_arguments_that_do_not_fit_are_named() -> None:
    place = Place("reference", torch.float32)
    tiles, tables = tables_of(place)
    shrunk, plane = partial_sums(place, 1), torch.zeros(NUM_SLOTS * 32)
    with pytest.raises(ValueError, match=r"slots is \[32\], not \[33\]"):
        store_residuals(shrunk, tiles, replace(tables, slots=tables.slots[1:]), None, plane, plane.clone())
    with pytest.raises(ValueError, match=r"v_plane is torch\.float16, not torch\.float32"):
        store_residuals(shrunk, tiles, tables, None, plane, plane.half())
    with pytest.raises(ValueError, match="shrunk has 1 modules"):
        store_residuals(shrunk[:, :, :1].contiguous(), tiles, tables, None, plane, plane.clone())
