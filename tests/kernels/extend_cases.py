"""Batches for ``residual_attention_extend`` as an engine would lay them out, with garbage everywhere else: both planes are NaN
where no cached position points, pages lie in random order, page tables end in numbers of pages that do not exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from forkkv_kernels.ops.residual_attention_extend import ExtendRows, Residuals
from torch import Tensor

from tests.kernels.test_rope import table

Random = Callable[..., Tensor]
NO_PAGE = 2**30
CLASSES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Seq:
    """num_rows after start_pos cached positions, of which (rows included) the first residual_len have a residual of adapter."""

    start_pos: int
    num_rows: int
    residual_len: int = 0
    adapter: int = -1

    @property
    def kv_len(self) -> int:
        return self.start_pos + self.num_rows


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    page_size: int = 16
    ranks: Sequence[tuple[int, int]] = ((4, 4),)
    """(r_k, r_v) of each adapter."""
    is_normed: bool = False
    stack_rank: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Batch:
    q: Tensor
    k_plane: Tensor
    v_plane: Tensor
    rows: ExtendRows
    residuals: Residuals
    scale: float

    def only_base(self) -> Batch:
        return replace(self, residuals=replace(self.residuals, adapters=torch.full_like(self.residuals.adapters, -1)))


def make_batch(seqs: Sequence[Seq], shape: Shape | None = None, seed: int = 0) -> Batch:
    shape = shape or Shape()
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int, strength: float = 1.0) -> Tensor:
        return (strength * torch.randn(*size, generator=generator)).to(shape.dtype)

    widths = [_row_class(ranks, shape) for ranks in shape.ranks]
    width, page_size = shape.num_kv_heads * shape.head_dim, shape.page_size
    num_pages = [-(-seq.kv_len // page_size) for seq in seqs]
    own_pages = [-(-seq.residual_len // page_size) if seq.adapter >= 0 else 0 for seq in seqs]
    base_elems = (sum(num_pages) + 3) * page_size * width
    total = base_elems + sum((n + 2) * page_size * widths[seq.adapter] for n, seq in zip(own_pages, seqs, strict=True)) + 4096
    planes = [torch.full((total,), float("nan"), dtype=shape.dtype) for _ in range(2)]

    order = torch.randperm(sum(num_pages) + 2, generator=generator).int()
    base_pages = torch.full((len(seqs), max(num_pages) + 2), NO_PAGE, dtype=torch.int32)
    residual_pages = torch.full((len(seqs), max(own_pages) + 1), NO_PAGE, dtype=torch.int32)
    first, used = 0, base_elems
    for n, seq in enumerate(seqs):
        base_pages[n, : num_pages[n]] = order[first : first + num_pages[n]]
        first += num_pages[n]
        slots = _slots(base_pages[n], seq.kv_len, page_size)
        for plane in planes:
            plane[:base_elems].view(-1, width)[slots] = random(seq.kv_len, width)
        if seq.adapter < 0:
            continue
        row, (rank_k, rank_v) = widths[seq.adapter], shape.ranks[seq.adapter]
        first_page = -(-used // (page_size * row))
        residual_pages[n, : own_pages[n]] = first_page + torch.randperm(own_pages[n], generator=generator).int()
        used = (first_page + own_pages[n]) * page_size * row
        slots = _slots(residual_pages[n], seq.residual_len, page_size)
        for plane, rank in zip(planes, (rank_k, rank_v), strict=True):
            pool = plane[: total // row * row].view(-1, row)
            pool[slots, :rank] = random(seq.residual_len, rank)
            if shape.is_normed and rank_k:
                start = _scale_column(rank_k, rank_v)
                scales = random(seq.residual_len, shape.num_kv_heads, strength=0.3)
                pool[slots, start : start + shape.num_kv_heads] = scales + (1 if plane is planes[0] else 0)

    num_rows = [seq.num_rows for seq in seqs]
    starts = torch.tensor([0, *num_rows]).cumsum(0).int()
    num_heads = shape.num_kv_heads * shape.group
    q = random(int(starts[-1]), num_heads, shape.head_dim)
    batch = Batch(
        q,
        planes[0],
        planes[1],
        ExtendRows(starts, torch.tensor([s.start_pos for s in seqs]).int(), base_pages, page_size, shape.num_kv_heads),
        _residuals(seqs, shape, widths, residual_pages, random),
        shape.head_dim**-0.5,
    )
    return moved(batch, torch.device(shape.device))


def moved(batch: Batch, device: torch.device) -> Batch:
    def move(thing: object) -> object:
        if isinstance(thing, Tensor):
            return thing.to(device)
        if isinstance(thing, (ExtendRows, Residuals)):
            return replace(thing, **{name: move(getattr(thing, name)) for name in thing.__slots__})
        return thing

    return replace(batch, **{name: move(getattr(batch, name)) for name in Batch.__dataclass_fields__})


def _row_class(ranks: tuple[int, int], shape: Shape) -> int:
    needed = max(ranks) + (shape.num_kv_heads if shape.is_normed and ranks[0] else 0)
    return next(c for c in CLASSES if c >= needed)


def _scale_column(rank_k: int, rank_v: int) -> int:
    return max(rank_k, rank_v)


def _slots(pages: Tensor, length: int, page_size: int) -> Tensor:
    positions = torch.arange(length)
    return pages[positions // page_size].long() * page_size + positions % page_size


def _residuals(seqs: Sequence[Seq], shape: Shape, widths: list[int], pages: Tensor, random: Random) -> Residuals:
    num_adapters = len(shape.ranks)
    factors = []
    for which in range(2):
        factor = torch.zeros(num_adapters, shape.stack_rank, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)
        for adapter, ranks in enumerate(shape.ranks):
            rank = ranks[which]
            factor[adapter, :rank] = random(rank, *factor.shape[2:], strength=0.5 / max(rank, 1) ** 0.5)
        factors.append(factor)
    columns = (
        torch.tensor([_scale_column(*ranks) if ranks[0] else -1 for ranks in shape.ranks]).int() if shape.is_normed else None
    )
    return Residuals(
        pages,
        torch.tensor([seq.residual_len for seq in seqs]).int(),
        torch.tensor([seq.adapter for seq in seqs]).int(),
        *factors,
        torch.tensor(shape.ranks).int(),
        torch.tensor(widths).int(),
        table(max(seq.kv_len for seq in seqs), shape.head_dim),
        columns,
        columns,
    )
