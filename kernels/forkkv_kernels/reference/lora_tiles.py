"""LoRA of many adapters in one call, driven by tables in device memory: another batch, other adapters or other ranks change
numbers in the tables and no shape, so that a captured graph serves them.

Rows come as E entries: entry e is row ``rows[e]`` of x and of out. A tile is a run of entries that share an adapter.

    shrunk[e, m, c] = x[rows[e]] . a[adapter, m, c] (+ 1 where c is the column of ones)           c < ranks[adapter, m]
    out[rows[e], columns of module m] += sum over c < ranks[adapter, m] of shrunk[e, m, c] b[adapter, c, columns of m]

Symbols: A adapter slots, M modules that read the same x (q, k, v; o; gate, up; down), R rank of the stacks (16, 32, 64, 128),
O the sum of the modules' outputs. Columns of a and rows of b beyond an adapter's rank are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraStacks:
    """One layer's adapters for modules that read the same x.

    a [A, M, R, in] and b [A, R, O], the scaling folded in, O the outputs of all modules side by side as in the fused linear;
    ranks [A, M] int32, 0: not targeted; out_sizes: outputs of each module. ones [A, M] int32: the column of ``lora_bias``
    (``reference.lora``), -1 without; None where no adapter has one.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    out_sizes: tuple[int, ...]
    ones: Tensor | None = None

    def from_module(self, first: int) -> LoraStacks:
        """Modules from ``first`` on, for a shrink alone: k and v of [q, k, v]. Views; b is left as it is."""
        ones = self.ones[:, first:] if self.ones is not None else None
        return replace(self, a=self.a[:, first:], ranks=self.ranks[:, first:], out_sizes=self.out_sizes[first:], ones=ones)


@dataclass(frozen=True, slots=True, eq=False)
class LoraTiles:
    """table [N, 3] int32: adapter (-1: nothing to do), first entry, number of entries, at most ``height``.

    rows [E] int32. height: 16 (decode), 32, 64 or 128. limits [E] int32: the entry takes part in the expand of its first so
    many modules; None: of all. An expand needs distinct rows, a shrink does not: it may run many adapters over the same rows.
    """

    table: Tensor
    rows: Tensor
    height: int
    limits: Tensor | None = None


def tile_table(segments: Sequence[tuple[int, int, int]], height: int, num_tiles: int) -> Tensor:
    """[num_tiles, 3] int32 on the CPU of segments (adapter, first entry, end of its entries), the rest without an adapter.

    Raises ValueError where they need more tiles.
    """
    cut = [
        (adapter, first, min(height, end - first)) for adapter, begin, end in segments for first in range(begin, end, height)
    ]
    if len(cut) > num_tiles:
        raise ValueError(f"num_tiles is {num_tiles}, and the segments need {len(cut)}: ask max_tiles")
    return torch.tensor(cut + [(-1, 0, 0)] * (num_tiles - len(cut)), dtype=torch.int32).view(num_tiles, 3)


def max_tiles(num_entries: int, num_segments: int, height: int) -> int:
    """Tiles that so many entries need at most in so many segments."""
    num_segments = min(num_segments, num_entries)
    return num_segments + (num_entries - num_segments) // height


def lora_shrink_tiles(x: Tensor, stacks: LoraStacks, tiles: LoraTiles) -> Tensor:
    """x [T, in] -> partial sums [S, E, M, R] fp32, to be added up over S; whatever is not in a tile or beyond a rank is
    garbage (here: NaN)."""
    num_modules, rank = stacks.a.shape[1:3]
    shrunk = x.new_full((1, len(tiles.rows), num_modules, rank), torch.nan, dtype=torch.float32)
    for adapter, first, count in _used(tiles):
        rows = x[tiles.rows[first : first + count].long()].float()
        for module, width in enumerate(stacks.ranks[adapter].tolist()):
            columns = rows @ stacks.a[adapter, module, :width].float().t()
            if stacks.ones is not None and stacks.ones[adapter, module] >= 0:
                columns[:, stacks.ones[adapter, module]] += 1.0
            shrunk[0, first : first + count, module, :width] = columns
    return shrunk


def lora_expand_tiles_(out: Tensor, shrunk: Tensor, stacks: LoraStacks, tiles: LoraTiles, adds: bool = True) -> None:
    """out [T, O] += its LoRA in place; not ``adds``: becomes it, 0 where a module is not targeted, in rows and modules that the
    tiles have. The sums are rounded to b's dtype, as a tensor between two linears is."""
    sums = shrunk.sum(dim=0)
    for adapter, first, count in _used(tiles):
        start = 0
        for module, (width, size) in enumerate(zip(stacks.ranks[adapter].tolist(), stacks.out_sizes, strict=True)):
            entries = torch.arange(first, first + count, device=out.device)
            if tiles.limits is not None:
                entries = entries[tiles.limits[entries] > module]
            columns = sums[entries, module, :width].to(stacks.b.dtype).float()
            added = columns @ stacks.b[adapter, :width, start : start + size].float()
            rows = tiles.rows[entries].long()
            before = out[rows, start : start + size].float() if adds else torch.zeros_like(added)
            out[rows, start : start + size] = (before + added).to(out.dtype)
            start += size


def _used(tiles: LoraTiles) -> list[tuple[int, int, int]]:
    return [(adapter, first, count) for adapter, first, count in tiles.table.tolist() if adapter >= 0]
