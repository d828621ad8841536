"""What LoRA adds to the linears of a step, Llama-3.1-8B: decode under a CUDA graph, prefill, residuals of many adapters.

The layers have weights of their own, so that none is still in the cache when its turn comes again. The baseline is the same
without LoRA in the same run; a target of 10 % is a ratio of 1 / 1.1. The engine's rows come first: the others say why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where nothing is installed

import torch
from forkkv_kernels._triton import lora_tiles as kernels
from forkkv_kernels._triton.lora_tiles import LONG, SHORT, Config
from forkkv_kernels.launch import interpreted
from forkkv_kernels.ops.lora_tiles import LoraStacks, LoraTiles, lora_shrink_tiles, max_tiles, tile_table
from forkkv_kernels.ops.store_residuals import ResidualTables, store_residuals
from harness import Call, copy_tb_per_s, device, floor_ms, is_tiny, row, time_ms
from torch import Tensor
from torch.nn import functional

from forkkv_cluster.engine.gpu.side_stream import SideStream
from forkkv_cluster.engine.models.config import parse_config
from forkkv_cluster.engine.models.llama import LLAMA as LLAMA_FAMILY
from forkkv_cluster.testing.decode_layers import DecodeLayers


@dataclass(frozen=True, slots=True)
class Group:
    """A fused linear."""

    name: str
    in_size: int
    out_sizes: tuple[int, ...]


LLAMA = (
    Group("qkv", 4096, (4096, 1024, 1024)),
    Group("o", 4096, (4096,)),
    Group("gate_up", 4096, (14336, 14336)),
    Group("down", 14336, (4096,)),
)
TINY = (Group("qkv", 64, (64, 32, 32)), Group("o", 64, (64,)), Group("gate_up", 64, (96, 96)), Group("down", 96, (64,)))
NUM_ADAPTERS, RANK, NUM_LAYERS = 8, 16, 4
TARGET, TARGET_WITHOUT = 1 / 1.1, 1 / 1.01
"""Of a decode step with adapters, and of one without while there are some: at most 10 % and 1 % slower than the base model."""
TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "torch_dtype": "float32",
}  # fmt: skip
CONFIG = TINY_CONFIG | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "torch_dtype": "bfloat16",
}  # fmt: skip
"""A few layers of Llama-3.1-8B."""

Layer = dict[str, tuple[Tensor, LoraStacks]]
"""By group: weight [out, in] and stacks."""
Step = Callable[[Layer], None]


def bench(quick: bool) -> Iterator[dict[str, Any]]:
    with interpreted() if is_tiny() else nullcontext():
        groups = TINY if is_tiny() else LLAMA
        layers = [_layer(groups) for _ in range(1 if is_tiny() else NUM_LAYERS)]
        rate = copy_tb_per_s(quick)
        yield from _engine_rows(quick)
        yield from _decode_rows(groups, layers, rate, quick)
        if not is_tiny() and not quick:
            yield from _tuning_rows(groups, layers, quick)
        yield from _single_rows(groups, layers, rate, quick)
        yield from _residual_rows(groups, layers, quick)
        yield from _prefill_rows(groups, layers, quick)


def _decode_rows(groups: tuple[Group, ...], layers: list[Layer], rate: float, quick: bool) -> Iterator[dict[str, Any]]:
    batch = 8 if is_tiny() else 32
    inputs = {group.name: _random(batch, group.in_size) for group in groups}
    active, none = _tiles(batch, NUM_ADAPTERS), _tiles(batch, 0)
    baseline = _time(layers, lambda layer: _plain(layer, inputs), quick)
    floor = floor_ms(sum(w.nbytes + s.a.nbytes + s.b.nbytes for w, s in layers[0].values()), 0, rate, 1)

    def serial(config: Config, tiles: LoraTiles = active) -> Step:
        return lambda layer: _serial(layer, inputs, tiles, config)

    side = torch.cuda.Stream(priority=-1) if not is_tiny() else None
    steps: list[tuple[str, Step]] = [
        ("one after the other", serial(SHORT)),
        ("tables without adapters", serial(SHORT, none)),
    ]
    if side is not None:
        steps += [
            ("shrink beside the product", lambda layer: _shrink_aside(layer, inputs, active, SHORT, side)),
            ("dependent launch", serial(replace(SHORT, pdl=True))),
        ]
    for name, step in steps:
        note = f"one layer, batch {batch}, {NUM_ADAPTERS} adapters of rank {RANK}"
        ms = _time(layers, step, quick)
        yield row(f"decode linears: {name}", ms, baseline_ms=baseline, floor_ms=floor, note=note)


def _tuning_rows(groups: tuple[Group, ...], layers: list[Layer], quick: bool) -> Iterator[dict[str, Any]]:
    """Other settings than the committed ones, for a decode step."""
    inputs, tiles = {group.name: _random(32, group.in_size) for group in groups}, _tiles(32, NUM_ADAPTERS)
    settings = {
        "128 outputs": replace(SHORT, block_n=128),
        "512 outputs": replace(SHORT, block_n=512),
        "256 inner": replace(SHORT, block_k=256),
        "expand in 8 warps": replace(SHORT, expand_warps=8),
        "shrink in 2 warps": replace(SHORT, shrink_warps=2),
        "1024 inner": replace(SHORT, block_k=1024),
    }
    baseline = _time(layers, lambda layer: _plain(layer, inputs), quick)
    for name, config in settings.items():
        ms = _time(layers, lambda layer, config=config: _serial(layer, inputs, tiles, config), quick)
        yield row(f"decode linears: {name}", ms, baseline_ms=baseline, note="one after the other")


def _single_rows(groups: tuple[Group, ...], layers: list[Layer], rate: float, quick: bool) -> Iterator[dict[str, Any]]:
    """Shrink and expand by themselves; the stacks of all layers together do not fit the cache."""
    batch = 8 if is_tiny() else 32
    tiles = _tiles(batch, NUM_ADAPTERS)
    for group in groups:
        x, out = _random(batch, group.in_size), _random(batch, sum(group.out_sizes))
        stacks = [layer[group.name][1] for layer in layers]
        shrunk = lora_shrink_tiles(x, stacks[0], tiles)
        shrinks: list[Call] = [lambda s=s, x=x: kernels.lora_shrink_tiles(x, s, tiles) for s in stacks]
        expands: list[Call] = [
            lambda s=s, out=out, shrunk=shrunk: kernels.lora_expand_tiles_(out, shrunk, s, tiles) for s in stacks
        ]
        weights = [layer[group.name][0] for layer in layers]
        product = time_ms([lambda w=w, x=x: functional.linear(x, w) for w in weights], quick)
        yield row(f"product {group.name}", product, floor_ms=floor_ms(weights[0].nbytes, 0, rate, 1))
        yield row(f"shrink {group.name}", time_ms(shrinks, quick), floor_ms=floor_ms(stacks[0].a.nbytes, 0, rate, 1))
        yield row(f"expand {group.name}", time_ms(expands, quick), floor_ms=floor_ms(stacks[0].b.nbytes, 0, rate, 1))


def _prefill_rows(groups: tuple[Group, ...], layers: list[Layer], quick: bool) -> Iterator[dict[str, Any]]:
    num_rows = 70 if is_tiny() else 8192
    height = 64
    tiles = LoraTiles(
        _on_device(tile_table([(0, 0, num_rows)], height, max_tiles(num_rows, 1, height))), _rows(num_rows), height
    )
    inputs = {group.name: _random(num_rows, group.in_size) for group in groups}
    baseline = _time(layers, lambda layer: _plain(layer, inputs), quick)
    settings = {"": LONG}
    if not quick:
        settings |= {", expand in 8 warps": replace(LONG, expand_warps=8), ", 128 inner": replace(LONG, block_k=128)}
    for name, config in settings.items():
        ms = _time(layers, lambda layer, config=config: _serial(layer, inputs, tiles, config), quick)
        yield row(f"prefill linears{name}", ms, baseline_ms=baseline, note=f"one layer, {num_rows} rows of one adapter")


def _residual_rows(groups: tuple[Group, ...], layers: list[Layer], quick: bool) -> Iterator[dict[str, Any]]:
    """x A_k and x A_v of every adapter over one context, as an eager pass writes them."""
    num_rows, height = (40, 64) if is_tiny() else (4096, 64)
    num_entries, (weight, stacks) = NUM_ADAPTERS * num_rows, layers[0]["qkv"]
    segments = [(adapter, adapter * num_rows, (adapter + 1) * num_rows) for adapter in range(NUM_ADAPTERS)]
    table = _on_device(tile_table(segments, height, max_tiles(num_entries, NUM_ADAPTERS, height)))
    tiles = LoraTiles(table, _rows(num_rows).repeat(NUM_ADAPTERS), height)
    tables = ResidualTables(_rows(num_entries).long(), stacks.ranks[:, 1:], torch.full_like(stacks.ranks[:, 0], RANK))
    planes = torch.zeros(2, num_entries * RANK, dtype=_dtype(), device=device())
    x = _random(num_rows, groups[0].in_size)

    def write() -> None:
        store_residuals(lora_shrink_tiles(x, stacks.from_module(1), tiles), tiles, tables, None, *planes)

    product = time_ms(lambda: functional.linear(x, weight), quick)
    note = f"{num_rows} rows, {NUM_ADAPTERS} adapters; baseline: the product of q, k and v"
    yield row("residuals of an eager pass", time_ms(write, quick), baseline_ms=product, note=note)


def _plain(layer: Layer, inputs: dict[str, Tensor]) -> None:
    for name, (weight, _) in layer.items():
        functional.linear(inputs[name], weight)


def _serial(layer: Layer, inputs: dict[str, Tensor], tiles: LoraTiles, config: Config) -> None:
    for name, (weight, stacks) in layer.items():
        out = functional.linear(inputs[name], weight)
        shrunk = kernels.lora_shrink_tiles(inputs[name], stacks, tiles, config)
        kernels.lora_expand_tiles_(out, shrunk, stacks, tiles, config)


def _shrink_aside(layer: Layer, inputs: dict[str, Tensor], tiles: LoraTiles, config: Config, side: torch.cuda.Stream) -> None:
    """The shrink reads what the product reads and not what it writes: both run at once."""
    for name, (weight, stacks) in layer.items():
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            shrunk = kernels.lora_shrink_tiles(inputs[name], stacks, tiles, config)
        out = functional.linear(inputs[name], weight)
        main.wait_stream(side)
        kernels.lora_expand_tiles_(out, shrunk, stacks, tiles, config)


def _engine_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Layers of a decode step but for their attention, by the engine's own decoder and adapters: what the targets are for."""
    batch, config = (
        (8, parse_config(TINY_CONFIG, LLAMA_FAMILY, {})) if is_tiny() else (32, parse_config(CONFIG, LLAMA_FAMILY, {}))
    )
    layers = DecodeLayers(config, batch, NUM_ADAPTERS, RANK, _dtype(), device())
    side = SideStream(device())
    adapters = [row * NUM_ADAPTERS // batch for row in range(batch)]

    def layer_ms(step: Call) -> float:
        return time_ms(step, quick) / config.num_layers

    baseline = layer_ms(layers.plain_step())
    note = f"one layer, batch {batch}, {NUM_ADAPTERS} adapters of rank {RANK}"
    for name, step, target in (
        ("LoRA beside the linears", layers.step(adapters, side), TARGET),
        ("LoRA in place", layers.step(adapters, None), None),
        ("adapters, but none in the batch", layers.step([None] * batch, side), TARGET_WITHOUT),
    ):
        yield row(f"engine, layer without attention: {name}", layer_ms(step), baseline_ms=baseline, target=target, note=note)


def _time(layers: list[Layer], step: Step, quick: bool) -> float:
    return time_ms([lambda layer=layer: step(layer) for layer in layers], quick)


def _layer(groups: tuple[Group, ...]) -> Layer:
    return {group.name: (_weight(group), _stacks(group)) for group in groups}


def _weight(group: Group) -> Tensor:
    return _random(sum(group.out_sizes), group.in_size).mul_(group.in_size**-0.5)


def _stacks(group: Group) -> LoraStacks:
    num_modules = len(group.out_sizes)
    a = _random(NUM_ADAPTERS, num_modules, RANK, group.in_size) / group.in_size**0.5
    b = _random(NUM_ADAPTERS, RANK, sum(group.out_sizes)) / 100
    ranks = torch.full((NUM_ADAPTERS, num_modules), RANK, dtype=torch.int32, device=device())
    return LoraStacks(a, b, ranks, group.out_sizes)


def _tiles(batch: int, num_adapters: int) -> LoraTiles:
    """As many tiles as if each row had its adapter, as a graph needs them; the rows dealt out to so many adapters."""
    count = batch // num_adapters if num_adapters else batch
    segments = [(adapter, adapter * count, (adapter + 1) * count) for adapter in range(num_adapters)]
    return LoraTiles(_on_device(tile_table(segments, 16, batch)), _rows(batch), 16)


def _rows(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device())


def _on_device(table: Tensor) -> Tensor:
    return table.to(device())


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=device(), dtype=_dtype())


def _dtype() -> torch.dtype:
    return torch.float32 if is_tiny() else torch.bfloat16
