"""A step's attention, by tables: sequences with one row (decode), and sequences with more (extend)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from forkkv_kernels.ops.combine_partials import Partials, combine_partials, new_partials
from forkkv_kernels.ops.residual_attention_decode import DecodeRows, Residuals, residual_attention_decode
from forkkv_kernels.ops.residual_attention_extend import (
    ExtendRows,
    residual_attention_extend,
)
from forkkv_kernels.ops.residual_attention_grouped import residual_attention_grouped
from forkkv_kernels.reference.rope_basis import RopeBasis
from torch import Tensor

from forkkv_cluster.engine.gpu.adapter_stacks import AdapterStacks
from forkkv_cluster.engine.gpu.step_sizes import DECODE, EXTEND, StepSizes
from forkkv_cluster.engine.gpu.step_tables import SpanSizes
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.rotary import RotaryTable


class TabledAttention:
    """As ``attention.Attention``. What differs from layer to layer is looked up in ``stacks`` and ``kv``."""

    def __init__(
        self, sizes: StepSizes, tables: Mapping[str, Tensor], stacks: AdapterStacks, kv: KVBuffers, rotary: RotaryTable,
        basis: RopeBasis, has_key_scale: bool,
    ) -> None:  # fmt: skip
        self._sizes, self._tables = sizes, tables
        self._stacks, self._kv, self._rotary = stacks, kv, rotary
        self._basis, self._has_key_scale = basis, has_key_scale
        self._is_mixed = sizes.decode is not None and sizes.extend is not None
        self._rows = {prefix: tables[f"{prefix}.rows"].long() for prefix in (DECODE, EXTEND)} if self._is_mixed else {}
        self._partials: Partials | None = None

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
        """What rows share and what each has for itself, into different splits of the same partial results."""
        sizes, planes = self._sizes, self._kv.planes(layer)
        assert sizes.decode is not None
        rows, residuals = self._decode_tables(sizes.decode, layer)
        num_splits = sizes.splits.own + (sizes.splits.run * sizes.shared.depth if sizes.shared is not None else 0)
        partials = self._partials_for(q, num_splits)
        scale = q.shape[-1] ** -0.5
        residual_attention_decode(q, *planes, rows, scale, partials, range(sizes.splits.own), residuals)
        if sizes.shared is not None:
            runs = sizes.shared.runs(self._tables, DECODE)
            basis = self._basis if self._stacks.has_k else None
            residual_attention_grouped(
                q, *planes, rows, runs, scale, partials, sizes.splits.run, residuals, basis, sizes.shared.end
            )
        out: Tensor = combine_partials(partials, q.dtype)
        return out

    def _partials_for(self, q: Tensor, num_splits: int) -> Partials:
        """One for all layers: each writes the same splits of a row, and those of runs that it is not in stay without a key."""
        if self._partials is None:
            num_rows, num_heads, head_dim = q.shape
            self._partials = new_partials(num_rows, num_heads, num_splits, head_dim, q.device)
        return self._partials

    def _decode_tables(self, sizes: SpanSizes, layer: int) -> tuple[DecodeRows, Residuals | None]:
        tables, geometry = self._tables, self._kv.geometry
        rows = DecodeRows(
            tables[f"{DECODE}.base_pages"], tables[f"{DECODE}.kv_lens"], geometry.page_size, geometry.num_kv_heads,
            tables[f"{DECODE}.kv_starts"],
        )  # fmt: skip
        return rows, self._residuals(DECODE, layer) if sizes.num_residual_pages else None

    def _residuals(self, prefix: str, layer: int) -> Residuals:
        tables, stacks = self._tables, self._stacks.residual(layer)
        return Residuals(
            pages=tables[f"{prefix}.residual_pages"],
            lens=tables[f"{prefix}.residual_lens"],
            adapters=tables[f"{prefix}.adapters"],
            b_k=stacks.decode_b_k if prefix == DECODE else stacks.b_k,
            b_v=stacks.b_v,
            ranks=stacks.ranks,
            rank_class=stacks.rank_class,
            cos_sin=self._rotary.rows,
            norm_column=stacks.norm_column if self._has_key_scale else None,
            change_column=stacks.change_column if self._has_key_scale else None,
        )

    def _extend(self, layer: int, q: Tensor) -> Tensor:
        assert self._sizes.extend is not None
        rows, residuals = self._extend_tables(self._sizes.extend, layer)
        out: Tensor = residual_attention_extend(q, *self._kv.planes(layer), rows, q.shape[-1] ** -0.5, residuals)
        return out

    def _extend_tables(self, sizes: SpanSizes, layer: int) -> tuple[ExtendRows, Residuals | None]:
        tables, geometry = self._tables, self._kv.geometry
        rows = ExtendRows(
            tables[f"{EXTEND}.query_starts"], tables[f"{EXTEND}.start_pos"], tables[f"{EXTEND}.base_pages"],
            geometry.page_size, geometry.num_kv_heads,
        )  # fmt: skip
        return rows, self._residuals(EXTEND, layer) if sizes.num_residual_pages else None
