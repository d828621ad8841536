"""x A and (x A) B over tiles of rows that share an adapter (``reference.lora_tiles`` has the tables).

Shrink reads A once: its long inner axis is cut into splits that write partial sums, so that few rows still fill the card, and
expand adds the splits up, always in the same order. In decode both are bound by the bytes of A and B and by launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from forkkv_kernels._triton.aot import AotVariant
from forkkv_kernels.reference.lora_tiles import LoraStacks, LoraTiles


@dataclass(frozen=True, slots=True)
class Config:
    """Block sizes: C columns of the shrink, K of its inner axis, N outputs of the expand.

    max_programs: of the shrink; its inner axis is cut as far as they allow. pdl: programs start while the kernel before them
    still runs, fetch their part of A or B, and wait for its end (programmatic dependent launch, from Hopper on).
    """

    block_c: int
    block_k: int
    block_n: int
    max_programs: int
    shrink_warps: int = 4
    expand_warps: int = 4
    num_stages: int = 3
    pdl: bool = False


SHORT = Config(block_c=16, block_k=512, block_n=256, max_programs=1 << 14)
"""For tiles of 16 rows, as in decode: each program of the shrink reads one block of A and is done."""
LONG = Config(block_c=64, block_k=64, block_n=128, max_programs=256)


@triton.jit(do_not_specialize=["num_entries"])
def _shrink_kernel(
    x_ptr, x_stride, a_ptr, a_stride, ranks_ptr, ranks_stride, ones_ptr, ones_stride, tiles_ptr, rows_ptr, out_ptr,
    in_size, num_columns, num_entries, split_size,
    R: tl.constexpr, HAS_ONES: tl.constexpr, IS_EVEN: tl.constexpr, IS_ONE_BLOCK: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    split, tile = tl.program_id(1), tl.program_id(2)
    adapter = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    count = tl.load(tiles_ptr + 3 * tile + 2)
    if PDL:
        gdc_launch_dependents()
    if adapter < 0:
        if PDL:
            gdc_wait()
        return
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rank = tl.load(ranks_ptr + adapter * ranks_stride + columns // R, mask=columns < num_columns, other=0)
    is_column = columns % R < rank
    members = tl.arange(0, BLOCK_M)
    is_member = members < count
    entries = (first + members).to(tl.int64)
    rows = tl.load(rows_ptr + entries, mask=is_member, other=0).to(tl.int64)

    start = split * split_size
    inner = start + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * x_stride + inner[None, :]
    a_ptrs = a_ptr + adapter.to(tl.int64) * a_stride + columns[None, :].to(tl.int64) * in_size + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    if IS_ONE_BLOCK:
        is_inner = inner < in_size
        a = tl.load(a_ptrs, mask=is_column[None, :] & is_inner[:, None], other=0.0)
        if PDL:
            gdc_wait()
        x = tl.load(x_ptrs, mask=is_member[:, None] & is_inner[None, :], other=0.0)
        total = tl.dot(x, a, total, input_precision=PRECISION)
    else:
        if PDL:
            gdc_wait()
        # No steps at all where there is nothing to do.
        is_needed = (tl.max(is_column.to(tl.int32), axis=0) > 0) & (count > 0)
        end = tl.where(is_needed, tl.minimum(start + split_size, in_size), start)
        for k in range(start, end, BLOCK_K):
            if IS_EVEN:
                a = tl.load(a_ptrs, mask=is_column[None, :], other=0.0)
                x = tl.load(x_ptrs, mask=is_member[:, None], other=0.0)
            else:
                is_inner = k + tl.arange(0, BLOCK_K) < end
                a = tl.load(a_ptrs, mask=is_column[None, :] & is_inner[:, None], other=0.0)
                x = tl.load(x_ptrs, mask=is_member[:, None] & is_inner[None, :], other=0.0)
            total = tl.dot(x, a, total, input_precision=PRECISION)
            a_ptrs += BLOCK_K
            x_ptrs += BLOCK_K
    if HAS_ONES:
        ones = tl.load(ones_ptr + adapter * ones_stride + columns // R, mask=is_column, other=-1)
        total += ((columns % R == ones) & (split == 0)).to(tl.float32)[None, :]
    out_ptrs = out_ptr + (split * num_entries + entries)[:, None] * num_columns + columns[None, :]
    tl.store(out_ptrs, total, mask=is_member[:, None] & is_column[None, :])


@triton.jit
def summed(ptrs, is_row, columns, rank, split_stride, NUM_SPLITS: tl.constexpr):
    """The sum over all splits of what stands at ``ptrs`` [M, C] in the first one, always in the same order; 0 in rows that are
    not ``is_row`` [M] and where ``columns`` [C] reach ``rank``."""
    is_column = (columns < rank)[None, :]
    # Whole vectors of four are read, whatever the rank, and what is beyond it put out afterwards.
    is_read = is_row[:, None] & (columns // 4 * 4 < rank)[None, :]
    total = tl.load(ptrs, mask=is_read, other=0.0)
    for split in tl.static_range(1, NUM_SPLITS):
        total += tl.load(ptrs + split * split_stride, mask=is_read, other=0.0)
    return tl.where(is_column, total, 0.0)


@triton.jit(do_not_specialize=["num_entries"])
def _expand_kernel(
    out_ptr, out_stride, shrunk_ptr, b_ptr, b_stride, b_row_stride, ranks_ptr, ranks_stride, tiles_ptr, rows_ptr, limits_ptr,
    num_columns, num_entries, size_0, size_1, size_2,
    NUM_SPLITS: tl.constexpr, R: tl.constexpr, HAS_LIMITS: tl.constexpr, ADDS: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    count = tl.load(tiles_ptr + 3 * tile + 2)
    if PDL:
        gdc_launch_dependents()
    if adapter < 0:
        if PDL:
            gdc_wait()
        return
    # Blocks of outputs run through the modules one after the other; none lies across two.
    blocks_0, blocks_1 = tl.cdiv(size_0, BLOCK_N), tl.cdiv(size_1, BLOCK_N)
    module = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    size = tl.where(module == 0, size_0, tl.where(module == 1, size_1, size_2))
    start = tl.where(module == 0, 0, tl.where(module == 1, size_0, size_0 + size_1))
    block -= tl.where(module == 0, 0, tl.where(module == 1, blocks_0, blocks_0 + blocks_1))

    rank = tl.load(ranks_ptr + adapter * ranks_stride + module)
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = (outputs < size)[None, :]
    members = tl.arange(0, BLOCK_M)
    is_member = members < count
    entries = (first + members).to(tl.int64)
    rows = tl.load(rows_ptr + entries, mask=is_member, other=0).to(tl.int64)
    if ADDS:
        is_member = is_member & (rank > 0)
    if HAS_LIMITS:
        is_member = is_member & (module < tl.load(limits_ptr + entries, mask=is_member, other=0))
    columns = tl.arange(0, BLOCK_R)
    shrunk_ptrs = shrunk_ptr + entries[:, None] * num_columns + (module * R + columns)[None, :]
    b_ptrs = b_ptr + adapter.to(tl.int64) * b_stride + columns[:, None].to(tl.int64) * b_row_stride
    b_ptrs += (start + outputs)[None, :]
    out_ptrs = out_ptr + rows[:, None] * out_stride + (start + outputs)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    split_stride = num_entries.to(tl.int64) * num_columns
    # The first block of B depends on no kernel before this one.
    b = tl.load(b_ptrs, mask=(columns < rank)[:, None] & is_output, other=0.0)
    if PDL:
        gdc_wait()
    is_changed = is_member[:, None] & is_output
    if ADDS:
        before = tl.load(out_ptrs, mask=is_changed, other=0.0)
    shrunk = summed(shrunk_ptrs, is_member, columns, rank, split_stride, NUM_SPLITS)
    total = tl.dot(shrunk.to(b.dtype), b, total, input_precision=PRECISION)
    for done in tl.static_range(BLOCK_R, R, BLOCK_R):
        shrunk = summed(shrunk_ptrs + done, is_member, done + columns, rank, split_stride, NUM_SPLITS)
        b = tl.load(b_ptrs + done * b_row_stride, mask=(done + columns < rank)[:, None] & is_output, other=0.0)
        total = tl.dot(shrunk.to(b.dtype), b, total, input_precision=PRECISION)
    if ADDS:
        total += before.to(tl.float32)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_changed)


def lora_shrink_tiles(x: Tensor, stacks: LoraStacks, tiles: LoraTiles, config: Config | None = None) -> Tensor:
    config = config or _config(tiles)
    num_modules, rank, in_size = stacks.a.shape[1:]
    num_columns = num_modules * rank
    block_c = min(config.block_c, triton.next_power_of_2(num_columns))
    column_blocks = triton.cdiv(num_columns, block_c)
    num_splits, split_size = _splits(in_size, len(tiles.table) * column_blocks, config)
    out = x.new_empty(num_splits, len(tiles.rows), num_modules, rank, dtype=torch.float32)
    if len(tiles.table) == 0:
        return out
    ones = stacks.ones
    _shrink_kernel[column_blocks, num_splits, len(tiles.table)](
        x, x.stride(0), stacks.a, stacks.a.stride(0), stacks.ranks, stacks.ranks.stride(0),
        ones if ones is not None else stacks.ranks, ones.stride(0) if ones is not None else 0, tiles.table, tiles.rows, out,
        in_size, num_columns, len(tiles.rows), split_size,
        R=rank, HAS_ONES=ones is not None, IS_EVEN=in_size % config.block_k == 0, IS_ONE_BLOCK=split_size == config.block_k,
        PDL=config.pdl, PRECISION=precision_of(x), BLOCK_M=tiles.height, BLOCK_C=block_c, BLOCK_K=config.block_k,
        num_warps=config.shrink_warps, num_stages=config.num_stages, **_launch_options(config),
    )  # fmt: skip
    return out


def lora_expand_tiles_(
    out: Tensor, shrunk: Tensor, stacks: LoraStacks, tiles: LoraTiles, config: Config | None = None, adds: bool = True
) -> None:
    if len(tiles.table) == 0:
        return
    config = config or _config(tiles)
    num_splits, num_entries, num_modules, rank = shrunk.shape
    sizes = [*stacks.out_sizes, 0, 0][:3]
    limits = tiles.limits
    _expand_kernel[sum(triton.cdiv(size, config.block_n) for size in sizes), len(tiles.table)](
        out, out.stride(0), shrunk, stacks.b, stacks.b.stride(0), stacks.b.stride(1), stacks.ranks, stacks.ranks.stride(0),
        tiles.table, tiles.rows, limits if limits is not None else tiles.rows,
        num_modules * rank, num_entries, *sizes,
        NUM_SPLITS=num_splits, R=rank, HAS_LIMITS=limits is not None, ADDS=adds, PDL=config.pdl,
        PRECISION=precision_of(out), BLOCK_M=tiles.height, BLOCK_N=config.block_n, BLOCK_R=min(rank, 32),
        num_warps=config.expand_warps, num_stages=1, **_launch_options(config),
    )  # fmt: skip


def _config(tiles: LoraTiles) -> Config:
    return SHORT if tiles.height == 16 else LONG


def _splits(in_size: int, programs: int, config: Config) -> tuple[int, int]:
    """(number of splits, inner elements of each, a multiple of the block). Few different numbers, since each is compiled."""
    blocks, wanted = triton.cdiv(in_size, config.block_k), config.max_programs // max(programs, 1)
    num_splits = blocks if wanted >= blocks else triton.next_power_of_2(max(wanted, 1) // 2 + 1)
    split_blocks = triton.cdiv(blocks, num_splits)
    return triton.cdiv(blocks, split_blocks), split_blocks * config.block_k


def precision_of(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _launch_options(config: Config) -> dict[str, bool]:
    return {"launch_pdl": True} if config.pdl else {}


def aot_variants() -> list[AotVariant]:
    """Decode and prefill of Llama-3.1-8B at rank 16: q, k and v, and down, whose inner axis is the longest."""
    return [
        _shrink_variant("qkv_decode", 16, 3, 16, SHORT),
        _expand_variant("qkv_decode", 16, 16, 8, SHORT, adds=False),
        _shrink_variant("down_prefill", 64, 1, 16, LONG),
        _expand_variant("down_decode", 16, 16, 28, SHORT, adds=False),
        _expand_variant("qkv_prefill", 64, 64, 1, LONG, adds=True),
    ]


def _shrink_variant(name: str, height: int, num_modules: int, rank: int, config: Config) -> AotVariant:
    signature = dict.fromkeys(("x_ptr", "a_ptr"), "*bf16") | {"out_ptr": "*fp32"}
    signature |= dict.fromkeys(("ranks_ptr", "ones_ptr", "tiles_ptr", "rows_ptr"), "*i32")
    signature |= dict.fromkeys(("x_stride", "a_stride", "in_size", "num_columns", "split_size"), "i32:16")
    signature |= {"num_entries": "i32", "ranks_stride": "i32", "ones_stride": "i32:16"}
    constants = {
        "R": rank, "HAS_ONES": False, "IS_EVEN": True, "IS_ONE_BLOCK": config is SHORT, "PDL": False, "PRECISION": "tf32",
        "BLOCK_M": height, "BLOCK_C": min(config.block_c, triton.next_power_of_2(num_modules * rank)),
        "BLOCK_K": config.block_k,
    }  # fmt: skip
    return AotVariant(_shrink_kernel, signature, constants, config.shrink_warps, config.num_stages, f"lora_shrink_{name}")


def _expand_variant(name: str, height: int, rank: int, num_splits: int, config: Config, adds: bool) -> AotVariant:
    signature = {"out_ptr": "*bf16", "shrunk_ptr": "*fp32", "b_ptr": "*bf16"}
    signature |= dict.fromkeys(("ranks_ptr", "tiles_ptr", "rows_ptr", "limits_ptr"), "*i32")
    signature |= dict.fromkeys(("out_stride", "b_stride", "b_row_stride", "num_columns"), "i32:16")
    signature |= {"num_entries": "i32", "ranks_stride": "i32", "size_0": "i32:16", "size_1": "i32:16", "size_2": "i32:16"}
    constants = {
        "NUM_SPLITS": num_splits, "R": rank, "HAS_LIMITS": name.startswith("qkv"), "ADDS": adds, "PDL": False,
        "PRECISION": "tf32", "BLOCK_M": height, "BLOCK_N": config.block_n, "BLOCK_R": min(rank, 32),
    }  # fmt: skip
    return AotVariant(_expand_kernel, signature, constants, config.expand_warps, 1, f"lora_expand_{name}")
