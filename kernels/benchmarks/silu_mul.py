"""silu(gate) * up against torch's own ops, at the width of Llama-3.1-8B."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from forkkv_kernels.launch import interpreted
from forkkv_kernels.ops.silu_mul import silu_mul
from forkkv_kernels.reference import silu_mul as reference
from harness import copy_tb_per_s, device, floor_ms, is_tiny, num_inputs, row, time_ms


def bench(quick: bool) -> Iterator[dict[str, Any]]:
    width, dtype = (40, torch.float32) if is_tiny() else (14336, torch.bfloat16)
    rate = copy_tb_per_s(quick)
    with interpreted() if is_tiny() else nullcontext():
        for num_rows in (2,) if is_tiny() else (1, 32, 8192):
            num_bytes = 3 * num_rows * width * dtype.itemsize
            sets = [torch.randn(num_rows, 2 * width, device=device(), dtype=dtype) for _ in range(num_inputs(num_bytes))]
            baseline = time_ms([lambda s=s: reference.silu_mul(s) for s in sets], quick)
            ms = time_ms([lambda s=s: silu_mul(s) for s in sets], quick)
            floor = floor_ms(num_bytes, 0, rate, 1)
            yield row(f"silu_mul {num_rows} x {width}", ms, baseline_ms=baseline, target=1.0, floor_ms=floor)
