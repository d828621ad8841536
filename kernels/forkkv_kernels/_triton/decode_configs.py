"""Block sizes of the decode ops."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """block_n: keys of a tile; 64 fill one warpgroup's product on an H100. block_m: columns that a kv head's g rows are padded
    to, at least 16 for a warpgroup's product. block_h: frequencies (of D/2) that K is rebuilt for at once."""

    block_n: int
    block_m: int
    block_h: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class GroupedConfig:
    """The same; columns are members * g. maxnreg: registers of a thread, at the price of spills, where set."""

    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@dataclass(frozen=True, slots=True)
class ScoresConfig:
    """Of ``residual_scores``. block_n divides 512. columns: of G in a program, members * g * R. programs: wanted, about."""

    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    columns: int = 256
    programs: int = 396


def decode_config(head_dim: int, group: int, itemsize: int, rank: int) -> DecodeConfig:
    """rank: of the stacks, 0 without residuals."""
    block_m, half = max(16, power_of_two(group)), max(8, power_of_two(head_dim // 2))  # a product's inner axis: 16 and more
    if itemsize == 4:  # without tensor cores: for parity runs
        return DecodeConfig(32, block_m, min(half, 32), 4, 1)
    if head_dim > 128 or rank > 32:
        return DecodeConfig(64, block_m, min(half, 32), 4, 2)
    return DecodeConfig(64, block_m, half, 4, 3)


def grouped_config(head_dim: int, num_columns: int, itemsize: int, rank: int) -> GroupedConfig:
    """num_columns: members times g, padded. rank: of the stacks, 0 without residuals."""
    if itemsize == 4:
        return GroupedConfig(32, 4, 1)
    if rank == 0:
        return GroupedConfig(64, 8 if num_columns > 64 or head_dim > 128 else 4, 2)
    # Two stages at least: a transposed tile that is not in a ring of the compiler's went wrong on the card (Triton 3.6, bf16).
    return GroupedConfig(64, 4, 2)


def scores_config(itemsize: int) -> ScoresConfig:
    if itemsize == 4:  # without tensor cores: for parity runs
        return ScoresConfig(32, 4, 1)
    return ScoresConfig()


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
