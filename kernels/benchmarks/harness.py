"""What the kernels' benchmarks share: rows, timing, baselines of torch, and the card's two ceilings.

A benchmark is a file ``kernels/benchmarks/<op>.py`` with ``bench(quick: bool)``, a generator (or a list) of ``row(...)``. It
takes its device from ``device()`` and, where that is a CPU, shapes that Triton's interpreter runs in a second or two: there it
proves that it works, not how fast. Run one alone: ``python kernels/benchmarks/part.py <op>``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

Call = Callable[[], object]


class Row(NamedTuple):
    """One measurement beside what it is compared with.

    ratio: baseline_ms / ms, above 1 where the op is faster than its baseline. target: the least ratio wanted. floor_ms: what
    bytes or arithmetic alone need.
    """

    name: str
    ms: float
    baseline_ms: float | None = None
    ratio: float | None = None
    target: float | None = None
    floor_ms: float | None = None
    note: str = ""

    @property
    def is_missed(self) -> bool:
        return self.target is not None and (self.ratio is None or not self.ratio >= self.target)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Raises TypeError for a field that a row does not have, or a missing one."""
        made = cls(**values)
        if made.ratio is None and made.baseline_ms is not None:
            made = made._replace(ratio=made.baseline_ms / made.ms)
        return made


def row(
    name: str,
    ms: float,
    *,
    baseline_ms: float | None = None,
    target: float | None = None,
    floor_ms: float | None = None,
    note: str = "",
) -> dict[str, Any]:
    """A ``Row`` as the dict that benchmarks yield; the ratio follows from the baseline."""
    return Row.from_dict(
        {"name": name, "ms": ms, "baseline_ms": baseline_ms, "target": target, "floor_ms": floor_ms, "note": note}
    )._asdict()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_tiny() -> bool:
    """No card: shapes for the interpreter."""
    return device().type == "cpu"


def num_inputs(bytes_per_call: int, most: int = 16) -> int:
    """Input sets to rotate among so that none of them is still in the L2 cache when its turn comes again."""
    if is_tiny():
        return 1
    cache = getattr(torch.cuda.get_device_properties(device()), "L2_cache_size", 64 << 20)
    return max(1, min(most, math.ceil(3 * cache / max(bytes_per_call, 1)) + 1))


def time_ms(calls: Call | Sequence[Call], quick: bool = False, graph: bool = True) -> float:
    """Median milliseconds of one call on the device.

    calls: the same work on different inputs, run in turn. ``graph``: replayed from one CUDA graph, which leaves out launch
    gaps; False for work that a graph cannot hold, with whatever time the host takes to launch it.
    """
    in_turn = [calls] if callable(calls) else list(calls)
    if is_tiny():
        return _time_on_host(in_turn)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for call in (*in_turn, *in_turn):  # compilation, workspaces and caches, on a stream that may be captured afterwards
            call()
    torch.cuda.synchronize()
    once = _events_ms(lambda: [call() for call in in_turn])
    rounds = max(1, min(200 // len(in_turn) + 1, math.ceil(2.0 / max(once, 1e-3))))

    def run_all() -> None:
        for _ in range(rounds):
            for call in in_turn:
                call()

    replay: Call = run_all
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run_all()
        replay = captured.replay
        replay()
    samples = [_events_ms(replay) for _ in range(7 if quick else 25)]
    return statistics.median(samples) / (rounds * len(in_turn))


def _events_ms(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _time_on_host(calls: Sequence[Call]) -> float:
    samples = []
    for call in calls:
        start = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples)


# Baselines: what torch does with the same shapes.


def sdpa_decode_ms(
    num_seqs: int, kv_len: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, quick: bool = False
) -> float:
    """One layer's decode of ``num_seqs`` sequences, each with contiguous KV of its own: q [N, Hq, 1, D], K and V
    [N, Hkv, kv_len, D]."""
    size = 2 * num_seqs * num_kv_heads * kv_len * head_dim * dtype.itemsize

    def make() -> Call:
        q = torch.randn(num_seqs, num_heads, 1, head_dim, dtype=dtype, device=device())
        k, v = (torch.randn(num_seqs, num_kv_heads, kv_len, head_dim, dtype=dtype, device=device()) for _ in range(2))
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return time_ms([make() for _ in range(num_inputs(size))], quick)


def sdpa_extend_ms(
    query_len: int, kv_len: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, quick: bool = False
) -> float:
    """One layer's attention of ``query_len`` rows at the end of ``kv_len`` keys, by torch's flash kernel: causal where the two
    are equal, else over all keys (flash has no causal form aligned to the end; the query's own part is small there)."""
    q = torch.randn(1, num_heads, query_len, head_dim, dtype=dtype, device=device())
    k, v = (torch.randn(1, num_kv_heads, kv_len, head_dim, dtype=dtype, device=device()) for _ in range(2))
    return time_ms(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=query_len == kv_len), quick)


def linear_ms(num_rows: int, weights: Sequence[Tensor], quick: bool = False) -> float:
    """All products x @ weight.T of ``num_rows`` rows in turn, weights [out, in]: milliseconds of one pass through all."""
    inputs = {
        width: torch.randn(num_rows, width, dtype=weights[0].dtype, device=device()) for width in {w.shape[1] for w in weights}
    }
    return time_ms(lambda: [F.linear(inputs[weight.shape[1]], weight) for weight in weights], quick)


# Ceilings of the card.


def copy_tb_per_s(quick: bool = False) -> float:
    """Rate of a large copy within the device, counting bytes read and written."""
    num_bytes = 2**24 if is_tiny() else 2**32
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device()).random_()
    target = torch.empty_like(source)
    # Not from a graph: its copy nodes reached 2.43 TB/s on an H100 whose decode kernels read 3.0.
    return 2 * num_bytes / time_ms(lambda: target.copy_(source), quick, graph=False) / 1e9


def read_tb_per_s(quick: bool = False) -> float:
    """Rate at which a large sum reads: what decode attention, which writes next to nothing, is up against."""
    num_bytes = 2**24 if is_tiny() else 2**32
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=device()).normal_()
    return num_bytes / time_ms(lambda: source.sum(), quick) / 1e9


def matmul_tflop_per_s(quick: bool = False) -> float:
    """Rate of a large bf16 matrix product of random numbers."""
    size = 256 if is_tiny() else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device()) for _ in range(2))
    return 2 * size**3 / time_ms(lambda: a @ b, quick) / 1e9


def floor_ms(num_bytes: float, flop: float, tb_per_s: float, tflop_per_s: float) -> float:
    """The larger of what the bytes and what the arithmetic need."""
    return max(num_bytes / tb_per_s / 1e9, flop / tflop_per_s / 1e9)
