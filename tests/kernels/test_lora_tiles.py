"""LoRA over tiles of rows that share an adapter, against float64 products of each row. What must not be read is NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from forkkv_kernels.ops.lora_tiles import (
    LoraStacks,
    LoraTiles,
    lora_expand_tiles_,
    lora_shrink_tiles,
    max_tiles,
    tile_table,
)
from torch import Tensor

from tests.kernels.place_sets import DOT_PLACES, REFERENCE
from tests.kernels.places import Place

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the norm of what is compared; tf32 would be at 3e-4, far beyond what fp32 may have."""


@dataclass(frozen=True, slots=True)
class Case:
    """ranks: by adapter, of each module. segments: (adapter, number of entries). stack_rank: R."""

    ranks: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[int, int], ...]
    out_sizes: tuple[int, ...]
    in_size: int = 48
    stack_rank: int = 16
    height: int = 16


CASES = {
    "ranks-0-1-8-16-of-qkv": Case(((0, 1, 8), (16, 16, 16), (8, 0, 0)), ((0, 3), (1, 1), (2, 5)), (40, 24, 24)),
    "ranks-17-and-64": Case(((17,), (64,), (1,)), ((2, 2), (0, 20), (1, 17)), (72,), stack_rank=64),
    "long-inner-axis": Case(((16,), (5,)), ((1, 4), (0, 4)), (130,), in_size=1300),
    "tiles-of-64-rows": Case(((16, 3), (32, 32)), ((0, 70), (-1, 9), (1, 64), (0, 1)), (33, 33), 200, 32, 64),
    "one-column-one-output": Case(((1,),), ((0, 1),), (1,), in_size=1),
    "base-model-only": Case(((16, 16),), ((-1, 7),), (16, 16)),
    "no-rows": Case(((16, 16),), (), (16, 16)),
}


def filled(place: Place, *shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(place.device, place.dtype)


def stacks_of(case: Case, place: Place) -> LoraStacks:
    """NaN beyond each rank."""
    num_adapters, num_modules = len(case.ranks), len(case.out_sizes)
    a = filled(place, num_adapters, num_modules, case.stack_rank, case.in_size, seed=1) / math.sqrt(case.in_size)
    b = filled(place, num_adapters, case.stack_rank, sum(case.out_sizes), seed=2)
    for adapter, ranks in enumerate(case.ranks):
        start = 0
        for module, (rank, size) in enumerate(zip(ranks, case.out_sizes, strict=True)):
            a[adapter, module, rank:] = math.nan
            b[adapter, rank:, start : start + size] = math.nan
            start += size
    ranks = torch.tensor(case.ranks, dtype=torch.int32, device=place.device)
    return LoraStacks(a, b, ranks, case.out_sizes)


def tiles_of(case: Case, place: Place, spare: int = 2) -> LoraTiles:
    """Entries are the rows in an order of their own; after them, and in tiles to spare, nothing."""
    segments, end = [], 0
    for adapter, count in case.segments:
        segments.append((adapter, end, end + count))
        end += count
    num_tiles = max_tiles(end, len(segments), case.height) + spare
    rows = torch.cat((torch.randperm(end, generator=torch.Generator().manual_seed(3)).int(), torch.full((spare,), -1).int()))
    return LoraTiles(tile_table(segments, case.height, num_tiles).to(place.device), rows.to(place.device), case.height)


def entry_adapters(tiles: LoraTiles) -> list[tuple[int, int]]:
    """(entry, adapter) of all entries with one."""
    return [(e, adapter) for adapter, first, n in tiles.table.tolist() if adapter >= 0 for e in range(first, first + n)]


def wanted_shrink(x: Tensor, stacks: LoraStacks, tiles: LoraTiles, entry: int, adapter: int, module: int) -> Tensor:
    rank = int(stacks.ranks[adapter, module])
    return stacks.a[adapter, module, :rank].double() @ x[int(tiles.rows[entry])].double()


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert not found.isnan().any()
    assert (found.double() - wanted.double()).norm() <= TOLERANCE[dtype] * max(float(wanted.double().norm()), 1e-3)


def num_rows(case: Case) -> int:
    return sum(count for _, count in case.segments)


@pytest.mark.parametrize("place", [REFERENCE, *DOT_PLACES])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shrink_gives_each_entry_its_adapter_s_columns(case: Case, place: Place) -> None:
    x, stacks, tiles = filled(place, num_rows(case), case.in_size, seed=0), stacks_of(case, place), tiles_of(case, place)
    with place.entered():
        shrunk = lora_shrink_tiles(x, stacks, tiles)
    assert shrunk.dtype == torch.float32
    assert shrunk.shape[1:] == (len(tiles.rows), len(case.out_sizes), case.stack_rank)
    for entry, adapter in entry_adapters(tiles):
        for module, rank in enumerate(case.ranks[adapter]):
            wanted = wanted_shrink(x, stacks, tiles, entry, adapter, module)
            assert_near(shrunk[:, entry, module, :rank].sum(dim=0), wanted, place.dtype)


def expanded(case: Case, place: Place, limits: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """out as the two ops leave it, and what it should be in float64; its rows are strided, NaN around them."""
    x, stacks, tiles = filled(place, num_rows(case), case.in_size, seed=0), stacks_of(case, place), tiles_of(case, place)
    if limits is not None:
        tiles = replace(tiles, limits=torch.tensor(limits, dtype=torch.int32, device=place.device))
    width = sum(case.out_sizes)
    whole = torch.full((num_rows(case), width + 8), math.nan, dtype=place.dtype, device=place.device)
    whole[:, 4:-4] = filled(place, num_rows(case), width, seed=4)
    out = whole[:, 4:-4]
    wanted = out.double()
    for entry, adapter in entry_adapters(tiles):
        start = 0
        for module, (rank, size) in enumerate(zip(case.ranks[adapter], case.out_sizes, strict=True)):
            if limits is None or module < limits[entry]:
                columns = wanted_shrink(x, stacks, tiles, entry, adapter, module)
                added = columns @ stacks.b[adapter, :rank, start : start + size].double()
                wanted[int(tiles.rows[entry]), start : start + size] += added
            start += size
    with place.entered():
        lora_expand_tiles_(out, lora_shrink_tiles(x, stacks, tiles), stacks, tiles)
    assert whole[:, :4].isnan().all()
    assert whole[:, -4:].isnan().all()
    return out, wanted


@pytest.mark.parametrize("place", [REFERENCE, *DOT_PLACES])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_expand_adds_each_row_its_adapter_s_product(case: Case, place: Place) -> None:
    found, wanted = expanded(case, place)
    assert_near(found, wanted, place.dtype)


@pytest.mark.parametrize("place", [REFERENCE, *DOT_PLACES])
@pytest.mark.parametrize("limits", [None, [1, 3, 0, 3, 1, 1, 0, 2, 3, 3, 3]], ids=["whole", "first-modules"])
def test_the_lora_by_itself_is_what_would_be_added(place: Place, limits: list[int] | None) -> None:
    """0 where a module is not targeted. What the tiles do not have stays as it is."""
    case = CASES["ranks-0-1-8-16-of-qkv"]
    x, stacks, tiles = filled(place, 9, case.in_size, seed=0), stacks_of(case, place), tiles_of(case, place)
    table = tile_table([(0, 0, 3), (-1, 3, 4), (2, 4, 8)], 16, 5).to(place.device)
    tiles = replace(tiles, table=table)
    if limits is not None:
        tiles = replace(tiles, limits=torch.tensor(limits, dtype=torch.int32, device=place.device))
    wanted = torch.zeros(9, sum(case.out_sizes), dtype=place.dtype, device=place.device)
    found = torch.full_like(wanted, 7)
    with place.entered():
        shrunk = lora_shrink_tiles(x, stacks, tiles)
        lora_expand_tiles_(found, shrunk, stacks, tiles, adds=False)
        lora_expand_tiles_(wanted, shrunk, stacks, tiles)
    starts = [0, *torch.tensor(case.out_sizes).cumsum(0).tolist()]
    for entry in range(9):
        num_modules = 0 if entry in (3, 8) else 3 if limits is None else limits[entry]
        row, changed = int(tiles.rows[entry]), starts[num_modules]
        assert torch.equal(found[row, :changed], wanted[row, :changed])
        assert (found[row, changed:] == 7).all()
    assert (wanted[tiles.rows[:3].long()] != 0).any()
    assert (found == 0).any()  # adapter 0 has no LoRA on the first module


@pytest.mark.parametrize("place", [REFERENCE, *DOT_PLACES])
def test_rows_of_the_base_model_keep_their_bits(place: Place) -> None:
    case = Case(((16, 16),), ((0, 3), (-1, 4)), (16, 16))
    found, wanted = expanded(case, place)
    rows = tiles_of(case, place).rows[3:7].long()
    assert torch.equal(found[rows].double(), wanted[rows])


@pytest.mark.parametrize("place", [REFERENCE, *DOT_PLACES])
def test_an_entry_may_take_part_in_its_first_modules_only(place: Place) -> None:
    """Rows whose k and v stay the base model's, because a residual holds their part."""
    case = Case(((8, 8, 8), (16, 16, 16)), ((0, 3), (1, 3)), (32, 16, 16))
    found, wanted = expanded(case, place, limits=[1, 3, 0, 3, 1, 1, 0, 0])
    assert_near(found, wanted, place.dtype)


@pytest.mark.parametrize("place", [REFERENCE, *DOT_PLACES])
def test_a_bias_is_one_rank_more_with_a_column_of_ones(place: Place) -> None:
    case = Case(((4, 3),), ((0, 5),), (16, 16), in_size=600)
    x, stacks, tiles = filled(place, 5, case.in_size, seed=0), stacks_of(case, place), tiles_of(case, place)
    stacks.a[0, 1, 2] = 0
    with_ones = replace(stacks, ones=torch.tensor([[-1, 2]], dtype=torch.int32, device=place.device))
    with place.entered():
        plain, found = (lora_shrink_tiles(x, each, tiles).sum(dim=0) for each in (stacks, with_ones))
    assert torch.equal(found[:5, 1, 2], torch.ones(5, device=place.device))
    assert torch.equal(found[:5, 0, :4], plain[:5, 0, :4])
    assert torch.equal(found[:5, 1, :2], plain[:5, 1, :2])


@pytest.mark.parametrize("place", [REFERENCE, *DOT_PLACES])
def test_a_shrink_of_the_last_modules_may_run_many_adapters_over_the_same_rows(place: Place) -> None:
    """x A_k and x A_v of every declared adapter, while the base model runs the shared context."""
    case = Case(((3, 8, 16), (16, 0, 4)), ((0, 4), (1, 4)), (32, 16, 16))
    stacks = stacks_of(case, place)
    x = filled(place, 4, case.in_size, seed=0)
    tiles = replace(tiles_of(case, place, spare=0), rows=torch.arange(4, device=place.device).int().repeat(2))
    with place.entered():
        shrunk = lora_shrink_tiles(x, stacks.from_module(1), tiles)
    assert shrunk.shape[2] == 2
    for entry, adapter in entry_adapters(tiles):
        for module in (1, 2):
            wanted = wanted_shrink(x, stacks, tiles, entry, adapter, module)
            assert_near(shrunk[:, entry, module - 1, : len(wanted)].sum(dim=0), wanted, place.dtype)


@pytest.mark.parametrize("place", DOT_PLACES)
def test_a_row_s_bits_depend_neither_on_its_place_nor_on_its_neighbours(place: Place) -> None:
    case = Case(((16,), (7,)), ((0, 5), (1, 4)), (40,), in_size=600)
    stacks, x = stacks_of(case, place), filled(place, 9, case.in_size, seed=0)

    def run(segments: list[tuple[int, int, int]], rows: list[int]) -> Tensor:
        table = tile_table(segments, 16, 4).to(place.device)
        tiles = LoraTiles(table, torch.tensor(rows, device=place.device).int(), 16)
        out = torch.zeros(9, 40, dtype=place.dtype, device=place.device)
        with place.entered():
            lora_expand_tiles_(out, lora_shrink_tiles(x, stacks, tiles), stacks, tiles)
        return out

    one = run([(0, 0, 5), (1, 5, 9)], [0, 1, 2, 3, 4, 5, 6, 7, 8])
    other = run([(1, 0, 4), (0, 4, 5), (0, 5, 9)], [8, 5, 7, 6, 0, 4, 3, 1, 2])
    assert torch.equal(one, other)


def test_segments_that_need_more_tiles_are_refused() -> None:
    assert tile_table([(3, 0, 20), (-1, 20, 21)], 16, 4).tolist() == [[3, 0, 16], [3, 16, 4], [-1, 20, 1], [-1, 0, 0]]
    with pytest.raises(ValueError, match="num_tiles is 2, and the segments need 3"):
        tile_table([(3, 0, 20), (0, 20, 21)], 16, 2)


@pytest.mark.parametrize("counts", [(1,), (16, 1), (17, 15, 1), (1, 1, 1, 1), (64,)])
def test_max_tiles_is_enough_however_the_segments_fall(counts: tuple[int, ...]) -> None:
    needed = sum(-(-count // 16) for count in counts)
    assert needed <= max_tiles(sum(counts), len(counts), 16)
    assert max_tiles(33, 2, 16) == 3


def test_arguments_that_do_not_fit_are_named() -> None:
    case = CASES["ranks-0-1-8-16-of-qkv"]
    place = Place("reference", torch.float32)
    stacks, tiles = stacks_of(case, place), tiles_of(case, place)
    with pytest.raises(ValueError, match=r"x is \[9, 47\], not \[any, 48\]"):
        lora_shrink_tiles(torch.zeros(9, 47), stacks, tiles)
    with pytest.raises(ValueError, match="height is 8, not one of"):
        lora_shrink_tiles(torch.zeros(9, 48), stacks, replace(tiles, height=8))
    with pytest.raises(ValueError, match=r"rows is torch\.int64, not torch\.int32"):
        lora_shrink_tiles(torch.zeros(9, 48), stacks, replace(tiles, rows=tiles.rows.long()))
    with pytest.raises(ValueError, match=r"out is \[9, 87\], not \[any, 88\]"):
        lora_expand_tiles_(torch.zeros(9, 87), torch.zeros(1, 11, 3, 16), stacks, tiles)


@pytest.mark.gpu
def test_fp32_is_not_rounded_to_tf32() -> None:
    place = Place("gpu", torch.float32)
    found, wanted = expanded(CASES["ranks-17-and-64"], place)
    assert_near(found, wanted, place.dtype)


@pytest.mark.gpu
def test_a_captured_graph_serves_other_adapters_and_ranks() -> None:
    place = Place("gpu", torch.bfloat16)
    first = Case(((16,), (4,)), ((0, 9),), (40,), in_size=600)
    second = replace(first, ranks=((2,), (16,)), segments=((1, 5), (0, 3), (-1, 1)))
    stacks, x = stacks_of(first, place), filled(place, 9, first.in_size, seed=0)
    tiles = replace(tiles_of(first, place), table=tile_table([(0, 0, 9)], 16, 4).to(place.device))
    out = torch.zeros(9, 40, dtype=place.dtype, device=place.device)

    def run() -> None:
        lora_expand_tiles_(out, lora_shrink_tiles(x, stacks, tiles), stacks, tiles)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    others = stacks_of(second, place)
    for target, source in ((stacks.a, others.a), (stacks.b, others.b), (stacks.ranks, others.ranks)):
        target.copy_(source)
    tiles.table.copy_(tile_table([(1, 0, 5), (0, 5, 8)], 16, 4))
    out.zero_()
    graph.replay()
    wanted = torch.zeros_like(out)
    lora_expand_tiles_(wanted, lora_shrink_tiles(x, others, tiles), others, tiles)
    assert torch.equal(out, wanted)
    assert wanted.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"pdl": True}, {"block_n": 64, "expand_warps": 2}, {"block_k": 256}], ids=str)
def test_settings_change_no_more_than_rounding(changes: dict[str, int]) -> None:
    """A kernel that starts before the one that writes its input ends must wait for it: eight rounds, each from the last one's
    output."""
    from forkkv_kernels._triton import lora_tiles as kernels

    place = Place("gpu", torch.bfloat16)
    case = Case(((16, 16), (9, 16)), ((0, 9), (1, 16), (0, 1)), (2048, 1024), in_size=3072)
    stacks, tiles = stacks_of(case, place), tiles_of(case, place)
    results = []
    for config in (kernels.SHORT, replace(kernels.SHORT, **changes)):
        out = filled(place, num_rows(case), case.in_size, seed=0)
        for _ in range(8):
            shrunk = kernels.lora_shrink_tiles(out, stacks, tiles, config)
            out = out.clone()
            kernels.lora_expand_tiles_(out, shrunk, stacks, tiles, config)
            out /= out.norm() / 1000
        results.append(out)
    assert_near(results[1], results[0], place.dtype)
