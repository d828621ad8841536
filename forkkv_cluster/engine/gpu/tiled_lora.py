"""The adapters of one step, by tables: one shrink and one expand a group of modules, whatever adapters there are."""

from __future__ import annotations

from collections.abc import Mapping

from forkkv_kernels.ops.lora_tiles import LoraTiles, lora_expand_tiles_, lora_shrink_tiles
from forkkv_kernels.ops.store_residuals import KeyScaleTables, ResidualTables, store_residuals
from torch import Tensor

from forkkv_cluster.engine.gpu.adapter_stacks import AdapterStacks
from forkkv_cluster.engine.gpu.step_sizes import LORA, WRITES
from forkkv_cluster.engine.gpu.step_tables import TileSizes
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.models.config import ModelConfig


class TiledLora:
    """As ``step_lora.StepLora``, over ``AdapterStacks``. ``lora`` or ``writes`` None: the step has none."""

    def __init__(
        self, tables: Mapping[str, Tensor], lora: TileSizes | None, writes: TileSizes | None, stacks: AdapterStacks,
        kv: KVBuffers, config: ModelConfig,
    ) -> None:  # fmt: skip
        self._stacks, self._kv, self._config = stacks, kv, config
        self._tiles = self._qkv_tiles = self._write_tiles = None
        self._slots: Tensor | None = None
        if lora is not None:
            self._qkv_tiles = lora.tiles(tables, LORA, has_limits=True)
            self._tiles = lora.tiles(tables, LORA)
        if writes is not None:
            self._write_tiles = writes.tiles(tables, WRITES)
            self._slots = tables[f"{WRITES}.slots"]

    def qkv_(self, index: int, qkv: Tensor, x: Tensor) -> None:
        """qkv [T, Q + 2 KV] of layer ``index`` from x [T, H], in place."""
        self._add_(index, "qkv", qkv, x, self._qkv_tiles)

    def add_(self, index: int, group: str, out: Tensor, x: Tensor) -> None:
        """out [T, fused out] of layer ``index`` from x [T, in], in place; group is ``o``, ``gate_up`` or ``down``."""
        self._add_(index, group, out, x, self._tiles)

    def _add_(self, index: int, group: str, out: Tensor, x: Tensor, tiles: LoraTiles | None) -> None:
        if tiles is not None and group in self._stacks.groups:
            stacks = self._stacks.lora(index)[group]
            lora_expand_tiles_(out, lora_shrink_tiles(x, stacks, tiles), stacks, tiles)

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
