"""Block sizes of ``residual_attention_extend``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExtendConfig:
    """block_m: query rows times query heads of one kv head. block_n: keys of a tile, at most 128."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class RebuildConfig:
    """block_n: positions of a program. heads: kv heads that it rebuilds one after the other, over the same angles."""

    block_n: int
    heads: int
    num_warps: int
    num_stages: int


_MULTIPROCESSORS = 100
"""Large blocks of rows where there are as many of them as a large card has multiprocessors, about."""

_HOPPER_SHARED_BYTES = 200 * 1024
"""Cards whose products read both operands from shared memory let a block have 227 KiB of it; before, 99 or 163."""


def extend_config(block_d: int, rank: int, itemsize: int, group: int, num_queries: int, shared_bytes: int) -> ExtendConfig:
    """rank: of the stacks. num_queries: rows times query heads. shared_bytes: what a block may have.

    On an H100 with D 128, 8,192 rows take 1.11 ms, with a stage more 1.14, a stage less 1.45, with tiles of 128 keys and a
    stage less 1.25. Elsewhere: what fits without spilled registers.
    """
    if itemsize == 4:  # for parity runs: without tensor cores, products are unrolled, and large ones take minutes to compile
        return ExtendConfig(max(16, _power_of_two(group)), 16, 4, 1)
    are_many = num_queries >= _MULTIPROCESSORS * 128
    if shared_bytes < _HOPPER_SHARED_BYTES:
        num_stages = 3 if rank <= 32 and block_d <= 128 else 1
        return ExtendConfig(128, 32, 8, num_stages) if are_many and block_d <= 128 else ExtendConfig(64, 32, 4, num_stages)
    if block_d > 128:
        return ExtendConfig(128, 32, 8, 2)
    if not are_many:
        return ExtendConfig(64, 64, 4, 3)
    return ExtendConfig(128, 64, 8, 3 if rank <= 64 else 2)


def rebuild_config(block_d: int, rank: int, itemsize: int, num_kv_heads: int) -> RebuildConfig:
    """Small programs, several to a multiprocessor: each begins with a chain of small loads."""
    heads = next(heads for heads in (4, 2, 1) if num_kv_heads % heads == 0)
    if itemsize == 4:
        return RebuildConfig(16, heads, 4, 1)
    return RebuildConfig(32, heads, 4 if block_d <= 128 else 8, 3 if rank <= 32 and block_d <= 128 else 1)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
