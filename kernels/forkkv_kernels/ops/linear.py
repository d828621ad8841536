"""y = x W^T + bias over weights packed once, for bfloat16 on CPUs with its dot product (``_cpu/linear.cpp``).

On two cores, the linear layers of the 82M shape: 1 row 5.6 ms (oneDNN over weights that it packed 9.3), 8 rows 4.7 (7.7), 64
rows 23 (26), 512 rows 206 (192).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forkkv_kernels._cpu.library import functions_for
from forkkv_kernels._cpu.structs import num_threads
from forkkv_kernels.ops.huge_pages import prefer_huge_pages

__all__ = ["PackedWeight", "pack_weight", "packed_linear"]

_PANEL = 64


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """W [out, in] as the op reads it: as many elements, outputs rounded up to 64."""

    pairs: Tensor
    out_size: int
    in_size: int


def pack_weight(weight: Tensor) -> PackedWeight | None:
    """weight [out, in]; None where there is no such op: another device or dtype, no bfloat16 dot product, an odd ``in``. Where
    the processor has matrix units (AMX) oneDNN uses them, and this op does not."""
    functions = functions_for(weight) if weight.dtype == torch.bfloat16 else None
    out_size, in_size = weight.shape
    if functions is None or not functions.has_linear() or in_size % 2 or torch.cpu._is_amx_tile_supported():
        return None
    pairs = weight.new_empty(-(-out_size // _PANEL) * _PANEL * in_size)
    prefer_huge_pages(pairs)
    rows = weight.contiguous()  # named: a copy has to live until it is read
    functions.pack_weight(rows.data_ptr(), pairs.data_ptr(), out_size, in_size, num_threads())
    return PackedWeight(pairs, out_size, in_size)


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [T, in] bf16, bias [out] bf16 -> [T, out]. A row's result does not depend on the other rows.

    Raises ValueError where x is not bf16 or does not fit the weight.
    """
    if x.dtype != torch.bfloat16 or x.shape[1] != weight.in_size:
        raise ValueError(f"x is {list(x.shape)} {x.dtype}, not [T, {weight.in_size}] torch.bfloat16")
    functions = functions_for(x)
    if functions is None:
        raise RuntimeError(f"there is no packed_linear for {x.dtype} on {x.device}")
    rows, added = x.contiguous(), bias.contiguous() if bias is not None else None
    out = x.new_empty(len(x), weight.out_size)
    functions.linear(
        rows.data_ptr(), weight.pairs.data_ptr(), added.data_ptr() if added is not None else None, out.data_ptr(),
        len(x), weight.out_size, weight.in_size, num_threads(),
    )  # fmt: skip
    return out
