"""What torch does on this card with the shapes of Llama-3.1-8B: the numbers that other benchmarks and the plan start from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from harness import (
    copy_tb_per_s,
    device,
    floor_ms,
    is_tiny,
    linear_ms,
    matmul_tflop_per_s,
    row,
    sdpa_decode_ms,
    sdpa_extend_ms,
    time_ms,
)


class Shape(NamedTuple):
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    prefill: int
    batches: tuple[int, ...]


FULL = Shape(32, 4096, 14336, 32, 8, 128, 32768, 8192, (1, 8, 16, 32))
TINY = Shape(2, 64, 96, 4, 2, 16, 64, 32, (1, 2))


def bench(quick: bool) -> Iterator[dict[str, Any]]:
    shape = TINY if is_tiny() else FULL
    dtype = torch.bfloat16
    copy, matmul = copy_tb_per_s(quick), matmul_tflop_per_s(quick)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    pair = 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize  # K and V of one token and layer
    for batch in shape.batches:
        ms = sdpa_decode_ms(batch, shape.context, *heads, dtype, quick)
        floor = floor_ms(batch * shape.context * pair, 0, copy, matmul)
        yield row(f"SDPA decode, {batch} x {shape.context}, own KV, a layer", ms, baseline_ms=floor, floor_ms=floor)
    batch = shape.batches[-1]
    floor = floor_ms(shape.context * pair, 0, copy, matmul)
    yield row(f"SDPA, {batch} agents stacked over {shape.context} shared", stacked_ms(batch, shape, quick), floor_ms=floor)
    weights = layer_weights(shape, dtype)
    num_bytes = sum(weight.nbytes for weight in weights)
    for batch in shape.batches:
        ms = linear_ms(batch, weights, quick)
        floor = floor_ms(num_bytes, 2 * batch * num_bytes / dtype.itemsize, copy, matmul)
        yield row(f"all linears of {shape.num_layers} layers, batch {batch}", ms, baseline_ms=floor, floor_ms=floor)
    del weights
    ms = sdpa_extend_ms(shape.prefill, shape.prefill, *heads, dtype, quick)
    flop = 2 * shape.prefill**2 * shape.num_heads * shape.head_dim
    yield row(
        f"SDPA causal prefill of {shape.prefill}", ms, floor_ms=flop / matmul / 1e9, note=f"{flop / ms / 1e9:.0f} TFLOP/s"
    )


def stacked_ms(num_agents: int, shape: Shape, quick: bool) -> float:
    """The rows of all agents as query rows over one KV: what a user of torch can do today."""
    q = torch.randn(1, shape.num_heads, num_agents, shape.head_dim, dtype=torch.bfloat16, device=device())
    k, v = (
        torch.randn(1, shape.num_kv_heads, shape.context, shape.head_dim, dtype=torch.bfloat16, device=device())
        for _ in range(2)
    )
    return time_ms(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), quick)


def layer_weights(shape: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k and v as one, o, gate and up as one, down, of every layer: [out, in]."""
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    sizes = (
        (qkv, shape.hidden),
        (shape.hidden, shape.num_heads * shape.head_dim),
        (2 * shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    )
    return [torch.randn(size, dtype=dtype, device=device()) * 0.02 for _ in range(shape.num_layers) for size in sizes]
