"""Decode of 32 agents that share a context of 32k tokens against torch's SDPA over a KV of each agent's own.

The aim: 4 times as fast with 32 adapters of rank 16 on q, k and v, 8 times with 8 adapters of four agents each, 12 where none
touches k; and within 2x of the floor, which is the larger of the bytes from memory (base pages and residuals once) and the
products with all their padding, at the rates that a copy and a matrix product of torch reach. Pages of 64, as an engine has
them where nothing else is said. Not ``quick``: also other block sizes, members of a group and numbers of splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from decode_inputs import Inputs, Layer, layer, make_inputs
from forkkv_kernels.launch import interpreted
from forkkv_kernels.ops.combine_partials import combine_partials, new_partials
from forkkv_kernels.ops.residual_attention_decode import residual_attention_decode
from forkkv_kernels.ops.residual_attention_grouped import SharedRuns, residual_attention_grouped
from forkkv_kernels.reference.rope_basis import BASIS, CHUNK, rope_basis
from harness import Call, copy_tb_per_s, device, floor_ms, is_tiny, matmul_tflop_per_s, num_inputs, row, sdpa_decode_ms, time_ms

RANK = 16
NUM_AGENTS = 32
NEAR = 32
"""Cosines and sines of a position that G is made of, at Llama-3.1's rope_theta."""


@dataclass(frozen=True)
class Sharing:
    """num_adapters 0: none. Members of a group and splits: what a planner would choose."""

    name: str
    num_adapters: int
    rank_k: int
    target: float | None
    members: int
    num_splits: int
    tuned: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Others to try: (members, num_splits, of GroupedConfig), of ScoresConfig."""


SHARINGS = (
    Sharing(
        "32 adapters on q, k, v",
        32,
        RANK,
        4.0,
        8,
        8,
        (
            ((8, 8, 64, 4, 3), ()),
            ((8, 16, 64, 4, 2), ()),
            ((8, 8, 64, 4, 2), (64, 4, 3, 256, 792)),
            ((8, 8, 64, 4, 2), (64, 4, 4, 256, 396)),
            ((8, 8, 64, 4, 2), (128, 8, 2, 256, 264)),
            ((4, 4, 64, 4, 2), ()),
        ),
    ),
    Sharing("8 adapters on q, k, v", 8, RANK, 8.0, 8, 8, (((4, 4, 64, 4, 2), ()),)),
    Sharing(
        "32 adapters on q, v", 32, 0, 12.0, 8, 8, (((8, 16, 64, 4, 2), ()), ((8, 8, 64, 4, 3), ()), ((16, 8, 64, 8, 2), ()))
    ),
    Sharing("no adapters", 0, 0, None, 16, 16, (((16, 16, 64, 4, 3), ()), ((16, 8, 64, 4, 3), ()), ((32, 16, 64, 8, 2), ()))),
)


def bench(quick: bool) -> Iterator[dict[str, Any]]:
    shape = layer()
    num_agents = 4 if is_tiny() else NUM_AGENTS
    rates = copy_tb_per_s(quick), matmul_tflop_per_s(quick)
    with interpreted() if is_tiny() else nullcontext():
        sdpa = sdpa_decode_ms(num_agents, shape.kv_len, *shape.heads, shape.dtype, quick)
        made = []
        for sharing in SHARINGS[:2] if is_tiny() else SHARINGS:
            sets = [_inputs(shape, sharing, num_agents) for _ in range(num_inputs(shape.base_bytes))]
            made.append((sharing, sets))
            members, num_splits = (2, 1) if is_tiny() else (sharing.members, sharing.num_splits)
            calls = [_call(inputs, shape, members, num_splits, sharing.rank_k > 0) for inputs in sets]
            yield row(
                f"grouped {num_agents} x {shape.kv_len}, {sharing.name}", time_ms(calls, quick), baseline_ms=sdpa,
                target=sharing.target, floor_ms=_floor_ms(shape, sharing, num_agents, members, rates),
                note=_difference(sets[0], shape, calls[0]),
            )  # fmt: skip
        if not quick and not is_tiny():
            for sharing, sets in made:
                yield from _tune(sets, shape, sharing, rates, sdpa)


def _inputs(shape: Layer, sharing: Sharing, num_agents: int) -> Inputs:
    adapters = [n * sharing.num_adapters // NUM_AGENTS if sharing.num_adapters else -1 for n in range(num_agents)]
    return make_inputs(shape, [0] * num_agents, adapters, sharing.rank_k, RANK if sharing.num_adapters else 0)


def _call(
    inputs: Inputs, shape: Layer, members: int, num_splits: int, has_k: bool, config: Any = None, scores_config: Any = None
) -> Call:
    runs = _runs(inputs, shape, members)
    partials = new_partials(len(inputs.q), shape.num_heads, num_splits, shape.head_dim, device())
    basis = None
    if has_k and inputs.residuals is not None:
        basis = rope_basis(inputs.residuals.cos_sin, torch.float32 if shape.dtype == torch.float32 else torch.float16)
    arguments = (
        inputs.q, inputs.k_plane, inputs.v_plane, inputs.rows, runs, inputs.scale, partials, num_splits, inputs.residuals,
        basis,
    )  # fmt: skip

    def run() -> torch.Tensor:
        if config is None:
            residual_attention_grouped(*arguments)
        else:
            from forkkv_kernels._triton.residual_attention_grouped import grouped

            grouped(*arguments, None, config, scores_config)
        return combine_partials(partials, inputs.q.dtype)

    return run


def _runs(inputs: Inputs, shape: Layer, members: int) -> SharedRuns:
    num_agents = len(inputs.q)
    places = torch.arange(num_agents, dtype=torch.int32, device=device()).view(-1, members)
    adapters = [-1] * num_agents if inputs.residuals is None else inputs.residuals.adapters.tolist()
    groups, subgroups = [], []
    for first in range(0, num_agents, members):
        own = adapters[first : first + members]
        start = len(subgroups)
        for adapter in dict.fromkeys(a for a in own if a >= 0):
            place = own.index(adapter)
            subgroups.append([adapter, place, place + own.count(adapter), first + place])
        groups.append([0, shape.kv_len, first, 0, start, len(subgroups)])
    tables = [torch.tensor(table or [[0] * 4], dtype=torch.int32, device=device()) for table in (groups, subgroups)]
    return SharedRuns(tables[0], places, tables[1])


def _floor_ms(shape: Layer, sharing: Sharing, num_agents: int, members: int, rates: tuple[float, float]) -> float:
    """Base pages and residuals once, without what is kept between the kernels; products as the kernels make them."""
    planes = 2 if sharing.rank_k else 1
    num_adapters = -(-sharing.num_adapters * num_agents // NUM_AGENTS)
    num_bytes = shape.base_bytes + num_adapters * shape.residual_bytes(RANK, planes)
    columns = members * shape.group
    products = 2 * shape.head_dim * columns  # of one key, kv head and group: K q and V P
    if sharing.num_adapters:
        products += members * RANK * columns  # P a_v, of each row with everyone's residual
    if sharing.rank_k:
        products += (NEAR + BASIS) * columns * RANK + BASIS * shape.head_dim * columns * RANK // CHUNK
    flop = 2 * products * (num_agents // members) * shape.num_kv_heads * shape.kv_len
    return floor_ms(num_bytes, flop, *rates)


def _difference(inputs: Inputs, shape: Layer, call: Call) -> str:
    """From each row by itself, as a part of its norm."""
    partials = new_partials(len(inputs.q), shape.num_heads, 8, shape.head_dim, device())
    residual_attention_decode(
        inputs.q, inputs.k_plane, inputs.v_plane, inputs.rows, inputs.scale, partials, range(8), inputs.residuals
    )
    right, found = combine_partials(partials, torch.float32), call()
    difference = torch.linalg.norm(found.float() - right) / torch.linalg.norm(right)
    return f"against SDPA over KV of its own; {difference:.1e} from ungrouped"


def _tune(
    sets: list[Inputs], shape: Layer, sharing: Sharing, rates: tuple[float, float], sdpa: float
) -> Iterator[dict[str, Any]]:
    from forkkv_kernels._triton.decode_configs import GroupedConfig, ScoresConfig
    from triton.runtime.errors import OutOfResources

    for (members, num_splits, *numbers), of_scores in sharing.tuned:
        name = f"tune {sharing.name} m{members} x{num_splits} n{numbers[0]} w{numbers[1]} s{numbers[2]}"
        name += f", scores n{of_scores[0]} w{of_scores[1]} s{of_scores[2]} p{of_scores[4]}" if of_scores else ""
        configs = GroupedConfig(*numbers), ScoresConfig(*of_scores)
        try:
            ms = time_ms(
                [_call(inputs, shape, members, num_splits, sharing.rank_k > 0, *configs) for inputs in sets], quick=True
            )
        except OutOfResources as error:
            yield row(name, float("nan"), note=f"{type(error).__name__}: {str(error)[:60]}")
            continue
        yield row(name, ms, baseline_ms=sdpa, floor_ms=_floor_ms(shape, sharing, len(sets[0].q), members, rates))
