"""LoRA of many adapters over one batch, driven by tables: see the reference of the same name for formula, tables and symbols.

Source: the segmented shrink and expand of Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285), here with one shrink for all
modules that read the same x, whose k and v columns are the residual KV, and with partial sums instead of atomics: the same
batch gives the same bits.

All tensors on one device. x, a, b and out have one dtype (fp32, fp16, bf16); sums are fp32. Nothing is read back from the
device, so that a CUDA graph captures both, and replays them with other numbers in ``LoraTiles``, ``ranks`` and the stacks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkkv_kernels.checks import check_device, check_dtype, check_rows, check_shape
from forkkv_kernels.launch import use_triton
from forkkv_kernels.reference import lora_tiles as reference
from forkkv_kernels.reference.lora_tiles import LoraStacks, LoraTiles, max_tiles, tile_table

__all__ = ["LoraStacks", "LoraTiles", "lora_expand_tiles_", "lora_shrink_tiles", "max_tiles", "tile_table"]

_HEIGHTS = (16, 32, 64, 128)
_MAX_MODULES = 3


def lora_shrink_tiles(x: Tensor, stacks: LoraStacks, tiles: LoraTiles) -> Tensor:
    """x [T, in], rows may be strided -> partial sums [S, E, M, R] fp32, to be added up over S, which depends on shapes only.

    Columns beyond a rank and entries outside every tile are left unwritten.
    """
    _check(stacks, tiles, x=x)
    check_shape("x", x, None, stacks.a.shape[3])
    if not use_triton(x):
        return reference.lora_shrink_tiles(x, stacks, tiles)
    from forkkv_kernels._triton import lora_tiles as kernels

    return kernels.lora_shrink_tiles(x, stacks, tiles)


def lora_expand_tiles_(out: Tensor, shrunk: Tensor, stacks: LoraStacks, tiles: LoraTiles, adds: bool = True) -> None:
    """out [T, O] += its LoRA in place, rows may be strided; shrunk [S, E, M, R] as the shrink with the same tiles gives it.

    Not ``adds``: out becomes the LoRA, 0 where a module is not targeted; rows without an adapter, and modules beyond their
    limits, stay as they are. It then needs nothing that the linear computes and can run beside it: ``add_rms_norm_``,
    ``silu_mul`` and ``store_kv`` take it as a second summand. Zeroed once, ``out`` serves all layers of a step.
    """
    _check(stacks, tiles, out=out)
    _check_expand(shrunk, stacks, tiles)
    check_shape("out", out, None, sum(stacks.out_sizes))
    if not use_triton(out):
        return reference.lora_expand_tiles_(out, shrunk, stacks, tiles, adds)
    from forkkv_kernels._triton import lora_tiles as kernels

    return kernels.lora_expand_tiles_(out, shrunk, stacks, tiles, adds=adds)


def _check_expand(shrunk: Tensor, stacks: LoraStacks, tiles: LoraTiles) -> None:
    num_modules, rank = stacks.a.shape[1:3]
    check_shape("shrunk", shrunk, None, len(tiles.rows), num_modules, rank)
    check_shape("b", stacks.b, None, rank, sum(stacks.out_sizes))
    check_rows("b", stacks.b)
    check_device(stacks.b.device, shrunk=shrunk)
    if not shrunk.is_contiguous():
        raise ValueError(f"shrunk has strides {shrunk.stride()}: hand it over as the shrink gave it")


def _check(stacks: LoraStacks, tiles: LoraTiles, **rows: Tensor) -> None:
    ((name, tensor),) = rows.items()
    num_adapters, num_modules, rank, _ = stacks.a.shape
    check_rows(name, tensor)
    check_dtype("a", stacks.a, tensor.dtype)
    check_dtype("b", stacks.b, tensor.dtype)
    check_shape("ranks", stacks.ranks, num_adapters, num_modules)
    check_dtype("ranks", stacks.ranks, torch.int32)
    check_shape("table", tiles.table, None, 3)
    check_dtype("table", tiles.table, torch.int32)
    check_dtype("rows", tiles.rows, torch.int32)
    if tiles.limits is not None:
        check_shape("limits", tiles.limits, len(tiles.rows))
        check_dtype("limits", tiles.limits, torch.int32)
    check_device(
        tensor.device,
        a=stacks.a,
        b=stacks.b,
        ranks=stacks.ranks,
        ones=stacks.ones,
        table=tiles.table,
        rows=tiles.rows,
        limits=tiles.limits,
    )  # fmt: skip
    if tiles.height not in _HEIGHTS:
        raise ValueError(f"height is {tiles.height}, not one of {_HEIGHTS}")
    if rank < 16 or rank & (rank - 1):
        raise ValueError(f"a has rank {rank}, not a power of two from 16 on")
    if num_modules != len(stacks.out_sizes) or num_modules > _MAX_MODULES:
        raise ValueError(f"a has {num_modules} modules, not {len(stacks.out_sizes)} as out_sizes, at most {_MAX_MODULES}")
    if stacks.a.stride()[1:] != (rank * stacks.a.shape[3], stacks.a.shape[3], 1):
        raise ValueError(f"a has strides {stacks.a.stride()}: each adapter's part has to be contiguous")
