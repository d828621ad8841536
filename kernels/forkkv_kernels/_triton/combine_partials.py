"""Splits merged: one program for a row and query head, its splits by sixteens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant
from forkkv_kernels.reference.combine_partials import Partials

_SPLITS_AT_ONCE = 16


@triton.jit
def combine_kernel(
    partial_ptr, lse_ptr, out_ptr, num_splits, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    is_dim = columns < HEAD_DIM
    highest = tl.full([], float("-inf"), tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + row * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(lse, axis=0))
    total = tl.zeros([], tl.float32)
    out = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + row * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
        is_used = lse > float("-inf")  # a split without a key was not written
        weights = tl.where(is_used, tl.exp2((lse - highest) * 1.4426950408889634), 0.0)
        at = partial_ptr + (row * num_splits + splits)[:, None] * HEAD_DIM + columns[None, :]
        part = tl.load(at, mask=is_used[:, None] & is_dim[None, :], other=0.0)
        out += tl.sum(weights[:, None] * part, axis=0)
        total += tl.sum(weights, axis=0)
    out = out / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty), mask=is_dim)


def combine_partials(partials: Partials, dtype: torch.dtype) -> Tensor:
    num_rows, num_heads, num_splits, head_dim = partials.out.shape
    out = torch.empty(num_rows, num_heads, head_dim, dtype=dtype, device=partials.out.device)
    if out.numel():
        combine_kernel[(num_rows * num_heads,)](
            partials.out, partials.lse, out, num_splits, HEAD_DIM=head_dim, BLOCK_S=_SPLITS_AT_ONCE,
            BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
        )  # fmt: skip
    return out


def aot_variants() -> list[AotVariant]:
    return [_variant("bf16", 128), _variant("fp16", 80)]


def _variant(dtype: str, head_dim: int) -> AotVariant:
    signature = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": f"*{dtype}", "num_splits": "i32"}
    constants = {"HEAD_DIM": head_dim, "BLOCK_S": _SPLITS_AT_ONCE, "BLOCK_D": triton.next_power_of_2(head_dim)}
    return AotVariant(combine_kernel, signature, constants, 4, 3, f"combine_partials_{dtype}_d{head_dim}")
