"""Sum and norm of a layer's hidden states against torch's own ops, at the width of Llama-3.1-8B."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from forkkv_kernels.launch import interpreted
from forkkv_kernels.ops.rms_norm import add_rms_norm_
from harness import Call, copy_tb_per_s, device, floor_ms, is_tiny, num_inputs, row, time_ms
from torch import Tensor
from torch.nn import functional

EPS = 1e-5


def bench(quick: bool) -> Iterator[dict[str, Any]]:
    width = 64 if is_tiny() else 4096
    rate = copy_tb_per_s(quick)
    with interpreted() if is_tiny() else nullcontext():
        for num_rows in (2,) if is_tiny() else (1, 32, 8192):
            num_bytes = 4 * num_rows * width * _dtype().itemsize  # hidden and delta read, hidden and the norm written
            sets = [_inputs(num_rows, width) for _ in range(num_inputs(num_bytes))]
            ours: list[Call] = [lambda s=s: add_rms_norm_(*s, EPS) for s in sets]
            torchs: list[Call] = [lambda s=s: _torch_add_rms_norm_(*s) for s in sets]
            baseline = time_ms(torchs, quick)
            yield row(
                f"add_rms_norm_ {num_rows} x {width}", time_ms(ours, quick), baseline_ms=baseline, target=1.0,
                floor_ms=floor_ms(num_bytes, 0, rate, 1), note="against add_ and torch's fused rms_norm",
            )  # fmt: skip


def _dtype() -> torch.dtype:
    return torch.float32 if is_tiny() else torch.bfloat16


def _inputs(num_rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, delta, weight. Added again and again: small, so that it does not grow out of its range."""
    hidden = torch.randn(num_rows, width, device=device(), dtype=_dtype())
    return hidden, torch.randn_like(hidden) / 1024, torch.randn(width, device=device(), dtype=_dtype())


def _torch_add_rms_norm_(hidden: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    hidden += delta
    return functional.rms_norm(hidden, weight.shape, weight, EPS)
