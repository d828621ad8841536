"""Partial results of attention over disjoint sets of keys, merged. Symbols: N rows, Hq query heads, S splits, D head dim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Partials:
    """out [N, Hq, S, D] fp32, normalised within a split; lse [N, Hq, S] fp32, the natural log of the sum of exp of its scores:
    -inf where a split has no key, and ``out`` is garbage there. Both contiguous."""

    out: Tensor
    lse: Tensor

    @property
    def num_splits(self) -> int:
        return self.lse.shape[2]


def combine_partials(partials: Partials, dtype: torch.dtype) -> Tensor:
    """o = sum_s exp(lse_s - max) out_s / sum_s exp(lse_s - max) in float64 -> [N, Hq, D]; zeros in rows without a key."""
    lse = partials.lse.double()
    highest = lse.amax(dim=-1, keepdim=True)
    weights = torch.exp(lse - torch.where(highest.isinf(), 0.0, highest)).unsqueeze(-1)
    out = torch.where(weights > 0, partials.out.double(), 0.0)
    total = weights.sum(dim=2)
    return ((weights * out).sum(dim=2) / torch.where(total > 0, total, 1.0)).to(dtype)
