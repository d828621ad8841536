"""A step's attention, by tables: sequences with one row (decode), and sequences with more (extend)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from forkkv_kernels.ops.residual_attention_extend import (
    ExtendResiduals,
    ExtendRows,
    residual_attention_extend,
    workspace_shape,
)
from torch import Tensor

from forkkv_cluster.engine.gpu.adapter_stacks import AdapterStacks
from forkkv_cluster.engine.gpu.step_sizes import DECODE, EXTEND, StepSizes
from forkkv_cluster.engine.gpu.step_tables import SpanSizes
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.rotary import RotaryTable

_WORKSPACE_ROWS = 256
"""Rows of a sequence, on average, from which K and V with the residual are built once instead of by every block of rows."""

_MAX_WORKSPACE_ELEMS = 1 << 29
"""1 GiB in bf16."""


class TabledAttention:
    """As ``attention.Attention``. What differs from layer to layer is looked up in ``stacks`` and ``kv``."""

    def __init__(
        self, sizes: StepSizes, tables: Mapping[str, Tensor], stacks: AdapterStacks, kv: KVBuffers, rotary: RotaryTable,
        has_key_scale: bool,
    ) -> None:  # fmt: skip
        self._sizes, self._tables = sizes, tables
        self._stacks, self._kv, self._rotary = stacks, kv, rotary
        self._has_key_scale = has_key_scale
        self._is_mixed = sizes.decode is not None and sizes.extend is not None
        self._rows = {prefix: tables[f"{prefix}.rows"].long() for prefix in (DECODE, EXTEND)} if self._is_mixed else {}
        self._workspace: Tensor | None = None

    def run(self, layer: int, q: Tensor) -> Tensor:
        """q [T, Hq, D] rotated -> [T, Hq, D]. Whatever this layer wrote in this step is visible."""
        if not self._is_mixed:
            return self._decode(layer, q) if self._sizes.decode is not None else self._extend(layer, q)
        out = torch.empty_like(q)
        for prefix, attend in ((DECODE, self._decode), (EXTEND, self._extend)):
            rows = self._rows[prefix]
            out[rows] = attend(layer, q[rows])
        return out

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        assert self._sizes.decode is not None
        rows, residuals = self._extend_tables(DECODE, self._sizes.decode, layer)
        out: Tensor = residual_attention_extend(q, *self._kv.planes(layer), rows, q.shape[-1] ** -0.5, residuals)
        return out

    def _extend(self, layer: int, q: Tensor) -> Tensor:
        assert self._sizes.extend is not None
        rows, residuals = self._extend_tables(EXTEND, self._sizes.extend, layer)
        workspace = self._workspace_for(rows, residuals, q) if residuals is not None else None
        out: Tensor = residual_attention_extend(q, *self._kv.planes(layer), rows, q.shape[-1] ** -0.5, residuals, workspace)
        return out

    def _extend_tables(self, prefix: str, sizes: SpanSizes, layer: int) -> tuple[ExtendRows, ExtendResiduals | None]:
        tables, geometry = self._tables, self._kv.geometry
        rows = ExtendRows(
            tables[f"{prefix}.query_starts"], tables[f"{prefix}.start_pos"], tables[f"{prefix}.base_pages"],
            geometry.page_size, geometry.num_kv_heads,
        )  # fmt: skip
        if not sizes.num_residual_pages:
            return rows, None
        stacks = self._stacks.residual(layer)
        residuals = ExtendResiduals(
            pages=tables[f"{prefix}.residual_pages"],
            lens=tables[f"{prefix}.residual_lens"],
            adapters=tables[f"{prefix}.adapters"],
            b_k=stacks.b_k,
            b_v=stacks.b_v,
            ranks=stacks.ranks,
            rank_class=stacks.rank_class,
            cos_sin=self._rotary.rows,
            norm_column=stacks.norm_column if self._has_key_scale else None,
            change_column=stacks.change_column if self._has_key_scale else None,
        )
        return rows, residuals

    def _workspace_for(self, rows: ExtendRows, residuals: ExtendResiduals, q: Tensor) -> Tensor | None:
        """One for all layers of the step; None where building K and V tile by tile is less work."""
        if self._workspace is None and len(q) >= _WORKSPACE_ROWS * len(rows.start_pos):
            shape = workspace_shape(rows, residuals)
            if torch.Size(shape).numel() <= _MAX_WORKSPACE_ELEMS:
                self._workspace = q.new_empty(shape)
        return self._workspace
