"""A decode step's layers as the device path runs them, but for attention: what a benchmark times and a test replays.

Random weights, random adapters on every linear of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.engine.adapters import AdapterWeights, LayerLora, module_shapes
from forkkv_cluster.engine.batch import AttentionSpan, Batch, LoraSegment
from forkkv_cluster.engine.dummy_weights import DummyWeights
from forkkv_cluster.engine.gpu.adapter_stacks import GROUPS, AdapterStacks
from forkkv_cluster.engine.gpu.packed_tables import PackedTables
from forkkv_cluster.engine.gpu.side_stream import SideStream
from forkkv_cluster.engine.gpu.step_plan import StepPlan
from forkkv_cluster.engine.gpu.step_sizes import StepSizes
from forkkv_cluster.engine.gpu.tiled_lora import TiledLora
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.linear import Linear
from forkkv_cluster.engine.layers.lora import FusedLora, LoraFactors, fuse
from forkkv_cluster.engine.layers.rotary import RotaryTable
from forkkv_cluster.engine.models.config import ModelConfig
from forkkv_cluster.engine.models.decoder import load_decoder
from forkkv_cluster.engine.step_inputs import StepRows
from forkkv_cluster.engine.step_lora import Product, StepAdapters

_PAGE_SIZE = 16


class DecodeLayers:
    """``num_rows`` sequences of one token each, and adapters of one rank in the slots from 0 on."""

    def __init__(
        self, config: ModelConfig, num_rows: int, num_adapters: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config, self._num_rows = config, num_rows
        weights = DummyWeights(dtype, device, std=config.hidden_size**-0.5)
        self._model = load_decoder(config, weights.take)
        geometry = KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, _PAGE_SIZE, dtype.itemsize)
        self._kv = KVBuffers(geometry, num_rows, dtype, device)
        self._stacks = AdapterStacks(config, geometry, dtype, device)
        for slot in range(num_adapters):
            self._stacks.hold(slot, _random_adapter(config, slot, rank, weights))
        self._rotary = RotaryTable(config.rope, config.head_dim, num_rows, dtype, device)
        self._device = device

    def plain_step(self) -> Callable[[], Tensor]:
        """-> hidden states [num_rows, H] of the base model, by nothing but its linears."""
        _, tables = self._tables([None] * self._num_rows)
        return lambda: self._run(tables, _NoAdapters())

    def step(self, adapters: Sequence[int | None], side: SideStream | None) -> Callable[[], Tensor]:
        """-> hidden states [num_rows, H]; row n runs the adapter of slot ``adapters[n]``, rows of one adapter side by side.
        LoRA runs on ``side``, or in place."""
        sizes, tables = self._tables(adapters)

        def run() -> Tensor:
            lora = TiledLora(tables.device, sizes.lora, sizes.writes, self._stacks, self._kv, self._config, side)
            return self._run(tables, lora)

        return run

    def _tables(self, adapters: Sequence[int | None]) -> tuple[StepSizes, PackedTables]:
        plan = StepPlan.of(_decode_batch(adapters), _PAGE_SIZE, max_members=1)
        sizes = StepSizes.of(plan, self._config.num_kv_heads).rounded(self._stacks.num_slots)
        tables = PackedTables(sizes.shapes(), self._device)
        sizes.fill(tables.host, plan)
        tables.upload()
        return sizes, tables

    def _run(self, tables: PackedTables, lora: StepAdapters) -> Tensor:
        names = ("token_ids", "positions", "base_slots", "output_rows")
        token_ids, positions, base_slots, output_rows = (tables.device[name].long() for name in names)
        rows = StepRows(token_ids, self._rotary.rows[positions], base_slots, output_rows)
        return self._model.forward(rows, _NoAttention(), lora, self._kv)[: self._num_rows]


class _NoAttention:
    def run(self, layer: int, q: Tensor) -> Tensor:
        return q


class _NoAdapters:
    def linear(self, index: int, group: str, base: Linear, x: Tensor) -> Product:
        return Product(base(x))

    def store_residuals(self, index: int, x: Tensor, k: Tensor) -> None:
        pass


def _decode_batch(adapters: Sequence[int | None]) -> Batch:
    """Sequence n: token n, at position 0, in page n."""
    num_rows, no_rows = len(adapters), np.zeros(0, dtype=np.int64)
    rows = np.arange(num_rows, dtype=np.int64)
    segments = []
    for adapter, group in groupby(range(num_rows), key=lambda row: adapters[row]):
        members = [*group]
        if adapter is not None:
            segments.append(LoraSegment(adapter, members[0], members[-1] + 1))
    spans = tuple(AttentionSpan(row, row + 1, 0, np.array([row], dtype=np.int32)) for row in range(num_rows))
    return Batch(
        token_ids=rows, positions=0 * rows, base_rows=rows, base_slots=_PAGE_SIZE * rows, plain_rows=no_rows,
        lora_segments=tuple(segments), residual_writes=(), attention=spans, logit_rows=rows,
    )  # fmt: skip


def _random_adapter(config: ModelConfig, slot: int, rank: int, weights: DummyWeights) -> AdapterWeights:
    shapes = module_shapes(config)

    def group(layer: int, modules: Sequence[str]) -> FusedLora | None:
        factors = {}
        for module in modules:
            (size_in, size_out), name = shapes[module], f"adapter.{slot}.{layer}.{module}"
            factors[module] = LoraFactors(
                weights.take(f"{name}.a", (rank, size_in)), weights.take(f"{name}.b", (rank, size_out))
            )
        return fuse(factors, {module: shapes[module][1] for module in modules})

    layers = tuple(LayerLora(*(group(layer, modules) for modules in GROUPS.values())) for layer in range(config.num_layers))
    info = AdapterInfo(f"adapter-{slot}", AdapterDigest(f"{slot:032x}"), "", rank, (*shapes,), 0)
    return AdapterWeights(info, layers, residual_rank=rank)
