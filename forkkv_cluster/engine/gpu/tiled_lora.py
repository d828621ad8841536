"""The adapters of one step, by tables: one shrink and one expand a group of modules, whatever adapters there are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from forkkv_kernels.ops.lora_tiles import lora_expand_tiles_, lora_shrink_tiles
from forkkv_kernels.ops.store_residuals import KeyScaleTables, ResidualTables, store_residuals
from torch import Tensor

from forkkv_cluster.engine.gpu.adapter_stacks import AdapterStacks
from forkkv_cluster.engine.gpu.side_stream import SideStream
from forkkv_cluster.engine.gpu.step_sizes import LORA, WRITES
from forkkv_cluster.engine.gpu.step_tables import TileSizes
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.linear import Linear
from forkkv_cluster.engine.models.config import ModelConfig
from forkkv_cluster.engine.step_lora import Product


class TiledLora:
    """As ``step_lora.StepLora``, over ``AdapterStacks``. ``lora`` or ``writes`` None: the step has none.

    With ``side`` LoRA is computed there, beside the linear, and left to be added by whoever reads its output: few rows cost
    launches and latency, which the linear hides. Without, in its turn and in place: many rows keep the device busy, and a
    second output would cost more than it saves.
    """

    def __init__(
        self, tables: Mapping[str, Tensor], lora: TileSizes | None, writes: TileSizes | None, stacks: AdapterStacks,
        kv: KVBuffers, config: ModelConfig, side: SideStream | None = None,
    ) -> None:  # fmt: skip
        self._stacks, self._kv, self._config = stacks, kv, config
        self._tiles = self._qkv_tiles = self._write_tiles = None
        self._slots: Tensor | None = None
        self._side = side
        self._added: dict[str, Tensor] = {}
        if lora is not None:
            self._qkv_tiles = lora.tiles(tables, LORA, has_limits=True)
            self._tiles = lora.tiles(tables, LORA)
            if side is not None:
                self._added = self._zeros(len(tables["token_ids"]))
        if writes is not None:
            self._write_tiles = writes.tiles(tables, WRITES)
            self._slots = tables[f"{WRITES}.slots"]

    def linear(self, index: int, group: str, base: Linear, x: Tensor) -> Product:
        """As ``StepAdapters.linear``. What is added is to be read before the next layer's linear of that group."""
        tiles = self._qkv_tiles if group == "qkv" else self._tiles
        if tiles is None or group not in self._stacks.groups:
            return Product(base(x))
        stacks = self._stacks.lora(index)[group]
        if self._side is None:
            out = base(x)
            lora_expand_tiles_(out, lora_shrink_tiles(x, stacks, tiles), stacks, tiles)
            return Product(out)
        added = self._added[group]
        with self._side.fork():
            lora_expand_tiles_(added, lora_shrink_tiles(x, stacks, tiles), stacks, tiles, adds=False)
        out = base(x)
        self._side.join()
        return Product(out, added)

    def _zeros(self, num_rows: int) -> dict[str, Tensor]:
        """By group what LoRA adds, [num_rows, fused out]. One for all layers, cleared once: the same rows are written in each,
        and no others."""
        widths = {group: sum(self._stacks.lora(0)[group].out_sizes) for group in sorted(self._stacks.groups)}
        dtype, device = self._kv.arena.dtype, self._kv.arena.device
        whole = torch.zeros(num_rows * sum(widths.values()), dtype=dtype, device=device)
        parts = torch.split(whole, [num_rows * width for width in widths.values()])
        return {group: part.view(num_rows, -1) for group, part in zip(widths, parts, strict=True)}

    def store_residuals(self, index: int, x: Tensor, k: Tensor) -> None:
        """x A_k and x A_v of every residual write, and under QK-norm what rescales K. k [T, Hkv, D] before its norm."""
        if self._write_tiles is None or self._slots is None:
            return
        stacks, residual = self._stacks.lora(index)["qkv"], self._stacks.residual(index)
        shrunk = lora_shrink_tiles(x, stacks.from_module(1), self._write_tiles)
        tables = ResidualTables(self._slots, residual.ranks, residual.rank_class)
        store_residuals(shrunk, self._write_tiles, tables, self._scale(index, k), *self._kv.planes(index))

    def _scale(self, index: int, k: Tensor) -> KeyScaleTables | None:
        if not self._config.qk_norm:
            return None
        residual, stacks = self._stacks.residual(index), self._stacks.lora(index)["qkv"]
        q_size, kv_size = stacks.out_sizes[:2]
        b = stacks.b[:, :, q_size : q_size + kv_size]
        return KeyScaleTables(k, b, residual.norm_column, residual.change_column, self._config.rms_norm_eps)
