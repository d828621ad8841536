"""Inputs of the decode benchmarks: one layer of Llama-3.1-8B over random pages. No benchmark by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from forkkv_kernels.ops.residual_attention_decode import DecodeRows, Residuals
from harness import device, is_tiny
from torch import Tensor

PAGE_SIZE = 64


@dataclass(frozen=True)
class Layer:
    num_kv_heads: int
    group: int
    head_dim: int
    kv_len: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def base_bytes(self) -> int:
        """K and V of one context."""
        return 2 * self.kv_len * self.width * self.dtype.itemsize

    def residual_bytes(self, rank: int, planes: int = 2) -> int:
        """Of one adapter over one context."""
        return planes * self.kv_len * rank * self.dtype.itemsize


def layer() -> Layer:
    if is_tiny():
        return Layer(1, 2, 32, 128, torch.float32)
    return Layer(8, 4, 128, 32768, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Inputs:
    q: Tensor
    k_plane: Tensor
    v_plane: Tensor
    rows: DecodeRows
    residuals: Residuals | None
    scale: float


def make_inputs(shape: Layer, contexts: list[int], adapters: list[int], rank_k: int, rank_v: int) -> Inputs:
    """Row n reads context contexts[n] under adapter adapters[n] (-1: none); rows of equal two have their pages in common."""
    num_contexts = max(contexts) + 1
    row_class = max(rank_k, rank_v, 8)
    pages = -(-shape.kv_len // PAGE_SIZE)
    pairs = sorted({(c, a) for c, a in zip(contexts, adapters, strict=True) if a >= 0})
    base_elems = num_contexts * pages * PAGE_SIZE * shape.width
    total = base_elems + (len(pairs) * pages + 1) * PAGE_SIZE * row_class
    planes = [_random(total, dtype=shape.dtype) for _ in range(2)]
    base = torch.randperm(num_contexts * pages, device=device()).int().view(num_contexts, pages)
    first = -(-base_elems // (PAGE_SIZE * row_class))
    own = first + torch.randperm(max(len(pairs), 1) * pages, device=device()).int().view(-1, pages)
    rows = DecodeRows(
        base[torch.tensor(contexts, device=device())].contiguous(),
        torch.full((len(contexts),), shape.kv_len, dtype=torch.int32, device=device()),
        PAGE_SIZE,
        shape.num_kv_heads,
    )
    q = _random(len(contexts), shape.num_heads, shape.head_dim, dtype=shape.dtype)
    residuals = None
    if pairs:
        place = {pair: index for index, pair in enumerate(pairs)}
        chosen = torch.tensor([place.get(pair, 0) for pair in zip(contexts, adapters, strict=True)], device=device())
        residuals = _residuals(shape, adapters, own[chosen].contiguous(), rank_k, rank_v, row_class)
    return Inputs(q, *planes, rows, residuals, shape.head_dim**-0.5)


def _residuals(shape: Layer, adapters: list[int], pages: Tensor, rank_k: int, rank_v: int, row_class: int) -> Residuals:
    num_adapters, stack_rank = max(adapters) + 1, max(16, row_class)
    factors = []
    for rank in (rank_k, rank_v):
        factor = 0.1 * _random(num_adapters, stack_rank, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)
        factor[:, rank:] = 0
        factors.append(factor)
    frequency = 500000.0 ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angle = torch.outer(torch.arange(shape.kv_len, dtype=torch.float64), frequency)
    lens = [shape.kv_len if adapter >= 0 else 0 for adapter in adapters]
    tables = (lens, adapters, [[rank_k, rank_v]] * num_adapters, [row_class] * num_adapters)
    lens_on, adapters_on, ranks, classes = (torch.tensor(t, dtype=torch.int32, device=device()) for t in tables)
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1).float().to(device())
    b_k = factors[0] if shape.dtype == torch.float32 else factors[0].half()  # what an engine keeps beside bf16
    return Residuals(pages, lens_on, adapters_on, b_k, factors[1], ranks, classes, cos_sin)


def _random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, dtype=dtype, device=device())
