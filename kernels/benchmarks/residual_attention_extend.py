"""Chunked prefill over pages against torch's flash attention over contiguous KV, and what a residual of rank 16 costs:
Llama-3.1-8B, bf16. ``python kernels/benchmarks/part.py residual_attention_extend`` tries block sizes too, unless --quick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from forkkv_kernels.launch import interpreted
from forkkv_kernels.ops.residual_attention_extend import (
    ExtendRows,
    Residuals,
    residual_attention_extend,
    workspace_shape,
)
from harness import copy_tb_per_s, device, floor_ms, is_tiny, matmul_tflop_per_s, row, time_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

RANK = 16
TUNED = (
    (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3),
    (128, 32, 4, 3),
)  # fmt: skip
TUNED_K = ((128, 64, 8, 2), (128, 64, 8, 4), (64, 64, 4, 2))
TUNED_REBUILD = ((64, 4, 8, 3), (64, 4, 8, 1), (64, 8, 8, 3), (64, 2, 8, 1), (32, 4, 4, 3), (32, 4, 4, 1), (32, 8, 4, 3))


@dataclass(frozen=True)
class Case:
    """num_seqs sequences of num_rows rows after the same start_pos positions, whose base pages they share."""

    name: str
    num_seqs: int
    start_pos: int
    num_rows: int
    page_size: int = 64
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def kv_len(self) -> int:
        return self.start_pos + self.num_rows

    @property
    def flop(self) -> float:
        """Of both products, over the keys that each row sees."""
        keys = self.num_rows * self.start_pos + self.num_rows * (self.num_rows + 1) / 2
        return 4.0 * self.num_seqs * self.heads[0] * self.head_dim * keys

    @property
    def num_bytes(self) -> float:
        """q and out once, K and V of shared and own positions once."""
        width, keys = self.heads[1] * self.head_dim, self.start_pos + self.num_seqs * self.num_rows
        return self.dtype.itemsize * 2.0 * (keys * width + self.num_seqs * self.num_rows * self.heads[0] * self.head_dim)


def bench(quick: bool) -> Iterator[dict[str, Any]]:
    tiny = {"heads": (4, 2), "head_dim": 16, "dtype": torch.float32, "page_size": 16}
    cases = [
        Case("8k prefill", 1, 0, 8192),
        Case("2k over 32k", 1, 32768, 2048),
        Case("8k prefill, pages of 16", 1, 0, 8192, page_size=16),
        Case("16 x 128 over 32k", 16, 32768, 128),
        Case("128 over 32k", 1, 32768, 128),
    ]
    if is_tiny():
        cases = [Case("20 over 40", 1, 40, 20, **tiny), Case("2 x 5 over 16", 2, 16, 5, **tiny)]
    ceilings = copy_tb_per_s(quick), matmul_tflop_per_s(quick)
    with interpreted() if is_tiny() else nullcontext():
        for case in cases:
            yield from _ways(case, ceilings, quick)
        if not quick and not is_tiny():
            for case in cases[:2]:
                yield from _tuned(case, ceilings)


def _ways(case: Case, ceilings: tuple[float, float], quick: bool) -> Iterator[dict[str, Any]]:
    """Plain against torch; with a residual against plain."""
    call, workspace = _inputs(case)
    floor = floor_ms(case.num_bytes, case.flop, *ceilings)
    plain = time_ms(lambda: call(None, None), quick)
    rates = {name: _sdpa_tflop_per_s(case, backend, quick) for name, backend in _backends().items()}
    others = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    flash = next(iter(rates.values()))
    yield row(
        f"extend {case.name}", plain, baseline_ms=case.flop / flash / 1e9, target=0.6 if case.num_rows >= 1024 else None,
        floor_ms=floor, note=f"{case.flop / plain / 1e9:.0f} TFLOP/s; torch: {others}",
    )  # fmt: skip
    for name, room in (("K and V rebuilt", workspace), ("K rebuilt", workspace[:1]), ("room of its own", None)):
        if room is None and case.num_seqs == 1:
            continue
        ms = time_ms(lambda room=room: call(True, room), quick)
        is_default = room is not None and len(room) == 1 + (case.num_rows > 512)
        target = 1 / 1.15 if is_default and case.num_rows >= 1024 else None
        right, found = call(True, workspace).double(), call(True, room).double()
        off = torch.linalg.norm(found - right) / torch.linalg.norm(right)
        note = f"rank {RANK} on k and v, {100 * (ms / plain - 1):+.0f} %; {off:.1e} from K and V rebuilt"
        yield row(f"extend {case.name}, {name}", ms, baseline_ms=plain, target=target, floor_ms=floor, note=note)


def _tuned(case: Case, ceilings: tuple[float, float]) -> Iterator[dict[str, Any]]:
    from forkkv_kernels._triton.extend_configs import ExtendConfig, RebuildConfig  # Here: Triton may be missing.
    from forkkv_kernels._triton.residual_attention_extend import extend, rebuild_kv

    q, k_plane, v_plane, rows, residuals, workspace = _tensors(case)
    floor = floor_ms(case.num_bytes, case.flop, *ceilings)
    args = q, k_plane, v_plane, rows, case.head_dim**-0.5
    for name, room, configs in (("plain", None, TUNED), ("K rebuilt", workspace[:1], TUNED_K)):
        for numbers in configs:
            own = None if room is None else residuals
            call = partial(extend, *args, own, room, ExtendConfig(*numbers))
            yield from _tried(f"tune extend {case.name}, {name} {numbers}", call, floor)
    for numbers in TUNED_REBUILD:
        call = partial(rebuild_kv, workspace, k_plane, v_plane, rows, residuals, RebuildConfig(*numbers))
        num_bytes = 4 * case.kv_len * case.heads[1] * case.head_dim * case.dtype.itemsize
        yield from _tried(f"tune rebuild_kv {case.name} {numbers}", call, num_bytes / ceilings[0] / 1e9)


def _tried(name: str, call: Callable[[], object], floor: float) -> Iterator[dict[str, Any]]:
    from triton.runtime.errors import OutOfResources

    try:
        yield row(name, time_ms(call, True), floor_ms=floor)
    except OutOfResources as error:
        yield row(name, float("nan"), note=str(error))


def _inputs(case: Case) -> tuple[Callable[[bool | None, Tensor | None], Tensor], Tensor]:
    q, k_plane, v_plane, rows, residuals, workspace = _tensors(case)

    def call(has_residual: bool | None, room: Tensor | None) -> Tensor:
        own = residuals if has_residual else None
        return residual_attention_extend(q, k_plane, v_plane, rows, case.head_dim**-0.5, own, room)

    return call, workspace


def _tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, ExtendRows, Residuals, Tensor]:
    num_heads, num_kv_heads = case.heads
    size, width, num_seqs = case.page_size, num_kv_heads * case.head_dim, case.num_seqs
    num_shared, num_pages = case.start_pos // size, -(-case.kv_len // size)
    num_base = num_shared + num_seqs * (num_pages - num_shared)
    first_own = num_base * width // RANK  # base pages first, then those of residuals
    own_pages = first_own + torch.randperm(num_seqs * num_pages, device=device()).int().view(num_seqs, num_pages)
    base = torch.randperm(num_base, device=device()).int()
    tails = base[num_shared:].view(num_seqs, num_pages - num_shared)
    base_pages = torch.cat((base[:num_shared].expand(num_seqs, -1), tails), dim=1)
    elems = num_base * size * width + num_seqs * num_pages * size * RANK
    k_plane, v_plane = (torch.randn(elems, device=device(), dtype=case.dtype) for _ in range(2))
    q = torch.randn(num_seqs * case.num_rows, num_heads, case.head_dim, device=device(), dtype=case.dtype)
    starts = torch.arange(num_seqs + 1, device=device(), dtype=torch.int32) * case.num_rows
    numbers = torch.full((num_seqs,), case.start_pos, device=device(), dtype=torch.int32)
    rows = ExtendRows(starts, numbers, base_pages, size, num_kv_heads)
    shape = (num_seqs, RANK, num_kv_heads, case.head_dim)
    b_k, b_v = (0.1 * torch.randn(shape, device=device()).to(case.dtype) for _ in range(2))
    ranks = torch.full((num_seqs, 2), RANK, device=device(), dtype=torch.int32)
    angles = torch.rand(case.kv_len, case.head_dim // 2, device=device())
    residuals = Residuals(
        own_pages,
        torch.full_like(numbers, case.kv_len),
        torch.arange(num_seqs, device=device(), dtype=torch.int32),
        b_k,
        b_v,
        ranks,
        ranks[:, 0].contiguous(),
        torch.cat((angles.cos(), angles.sin()), dim=-1),
    )
    workspace = torch.empty(workspace_shape(rows, residuals), device=device(), dtype=case.dtype)
    return q, k_plane, v_plane, rows, residuals, workspace


def _backends() -> dict[str, list[SDPBackend]]:
    if is_tiny():
        return {"math": [SDPBackend.MATH]}
    return {"flash": [SDPBackend.FLASH_ATTENTION], "cuDNN": [SDPBackend.CUDNN_ATTENTION]}


def _sdpa_tflop_per_s(case: Case, backend: list[SDPBackend], quick: bool) -> float:
    """Rate of torch's attention over contiguous KV: causal without cached positions, else over all keys (its causal mask starts
    at the first key), counting what it computes then."""
    is_causal = case.start_pos == 0
    q = torch.randn(case.num_seqs, case.heads[0], case.num_rows, case.head_dim, dtype=case.dtype, device=device())
    shape = (case.num_seqs, case.heads[1], case.kv_len, case.head_dim)
    k, v = (torch.randn(shape, dtype=case.dtype, device=device()) for _ in range(2))
    full = 4.0 * case.num_seqs * case.heads[0] * case.head_dim * case.num_rows * case.kv_len
    with sdpa_kernel(backend):
        ms = time_ms(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=is_causal), quick)
    return (case.flop if is_causal else full) / ms / 1e9
