"""Partial attention over splits of the keys, merged:

    o = sum_s exp(lse_s - max) out_s / sum_s exp(lse_s - max)

Splits of one call, of calls over different tokens and of grouped attention lie side by side in the same buffers; a split that
nobody wrote has lse -inf (``new_partials``). Source: the online softmax, arXiv 1805.02867, as in flash decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkkv_kernels.checks import check_dtype, check_shape
from forkkv_kernels.launch import use_triton
from forkkv_kernels.reference import combine_partials as reference
from forkkv_kernels.reference.combine_partials import Partials

__all__ = ["Partials", "combine_partials", "new_partials"]


def new_partials(num_rows: int, num_heads: int, num_splits: int, head_dim: int, device: torch.device) -> Partials:
    """Buffers in which no split has a key. They can serve step after step where each step writes the same splits of a row, or
    clears ``lse`` first (``partials.lse.fill_(-inf)``; ``out`` needs nothing)."""
    out = torch.empty(num_rows, num_heads, num_splits, head_dim, dtype=torch.float32, device=device)
    return Partials(out, torch.full((num_rows, num_heads, num_splits), float("-inf"), device=device))


def combine_partials(partials: Partials, dtype: torch.dtype) -> Tensor:
    """-> [N, Hq, D] in ``dtype``, contiguous; zeros in a row that has no key at all."""
    check_partials(partials)
    if not use_triton(partials.out):
        return reference.combine_partials(partials, dtype)
    from forkkv_kernels._triton.combine_partials import combine_partials as combine  # Here: Triton may be missing.

    return combine(partials, dtype)


def check_partials(partials: Partials) -> None:
    check_shape("partials.out", partials.out, *partials.lse.shape, None)
    for name in ("out", "lse"):
        tensor: Tensor = getattr(partials, name)
        check_dtype(f"partials.{name}", tensor, torch.float32)
        if not tensor.is_contiguous():
            raise ValueError(f"partials.{name} has strides {tensor.stride()}: it has to be contiguous")
