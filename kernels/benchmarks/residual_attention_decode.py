"""Decode of separate sequences at 32k context against torch's SDPA over contiguous KV, with adapters and without.

The aim: at least 90 % of SDPA's rate without adapters, at most 15 % slower with rank 16 than without. Not ``quick``: also other
block sizes and numbers of splits, for the table of configurations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from decode_inputs import Inputs, Layer, layer, make_inputs
from forkkv_kernels.launch import interpreted
from forkkv_kernels.ops.combine_partials import combine_partials, new_partials
from forkkv_kernels.ops.residual_attention_decode import residual_attention_decode, suggested_splits
from harness import Call, copy_tb_per_s, device, floor_ms, is_tiny, row, sdpa_decode_ms, time_ms

RANK = 16
PLAIN_TUNED = ((64, 16, 64, 4, 3, 8), (64, 16, 64, 4, 2, 4), (64, 8, 64, 4, 3, 4), (128, 16, 64, 4, 3, 4))
RANKED_TUNED = (
    (64, 16, 64, 4, 3, 2),
    (64, 16, 64, 4, 3, 8),
    (64, 16, 64, 4, 2, 4),
    (64, 16, 32, 4, 3, 4),
    (64, 8, 64, 4, 3, 4),
)
"""(block_n, block_m, block_h, num_warps, num_stages, num_splits)"""


def bench(quick: bool) -> Iterator[dict[str, Any]]:
    shape = layer()
    rate = copy_tb_per_s(quick)
    with interpreted() if is_tiny() else nullcontext():
        for num_rows in (1,) if is_tiny() else (16, 1, 8, 32):
            is_aim = num_rows == 16
            contexts = list(range(num_rows))
            sdpa = sdpa_decode_ms(
                num_rows, shape.kv_len, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype, quick
            )
            inputs = make_inputs(shape, contexts, contexts, RANK, RANK)
            plain = time_ms(_call(inputs, shape, residuals=False), quick)
            yield row(
                f"decode {num_rows} x {shape.kv_len}, rank 0", plain, baseline_ms=sdpa, target=0.9 if is_aim else None,
                floor_ms=floor_ms(num_rows * shape.base_bytes, 0, rate, 1), note="against SDPA over contiguous KV",
            )  # fmt: skip
            num_bytes = num_rows * (shape.base_bytes + shape.residual_bytes(RANK))
            yield row(
                f"decode {num_rows} x {shape.kv_len}, rank {RANK}", time_ms(_call(inputs, shape), quick), baseline_ms=plain,
                target=1 / 1.15 if is_aim else None, floor_ms=floor_ms(num_bytes, 0, rate, 1), note="against rank 0",
            )  # fmt: skip
            if is_aim and not quick:
                yield from _tune(inputs, shape, sdpa, PLAIN_TUNED, residuals=False)
                yield from _tune(inputs, shape, plain, RANKED_TUNED, residuals=True)
            del inputs


def _call(inputs: Inputs, shape: Layer, residuals: bool = True, num_splits: int | None = None, config: Any = None) -> Call:
    num_rows = len(inputs.q)
    num_splits = num_splits or suggested_splits(num_rows, shape.num_kv_heads, shape.kv_len, device())
    partials = new_partials(num_rows, shape.num_heads, num_splits, shape.head_dim, device())
    arguments = (
        inputs.q, inputs.k_plane, inputs.v_plane, inputs.rows, inputs.scale, partials, range(num_splits),
        inputs.residuals if residuals else None,
    )  # fmt: skip

    def run() -> torch.Tensor:
        if config is None:
            residual_attention_decode(*arguments)
        else:
            from forkkv_kernels._triton.residual_attention_decode import decode

            decode(*arguments, config)
        return combine_partials(partials, inputs.q.dtype)

    return run


def _tune(
    inputs: Inputs, shape: Layer, baseline: float, tuned: tuple[tuple[int, ...], ...], residuals: bool
) -> Iterator[dict[str, Any]]:
    from forkkv_kernels._triton.decode_configs import DecodeConfig
    from triton.runtime.errors import OutOfResources

    for *numbers, num_splits in tuned:
        config = DecodeConfig(*numbers)
        name = f"tune r{RANK * residuals} n{numbers[0]} m{numbers[1]} h{numbers[2]} w{numbers[3]} s{numbers[4]} x{num_splits}"
        try:
            ms = time_ms(_call(inputs, shape, residuals, num_splits, config), quick=True)
        except OutOfResources as error:
            yield row(name, float("nan"), note=f"{type(error).__name__}: {str(error)[:60]}")
            continue
        yield row(name, ms, baseline_ms=baseline)
