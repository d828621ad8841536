"""The LoRA of one step, layer by layer: segment by segment, or all segments in one call where they are short."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from forkkv_kernels.ops.lora import LORA_SEGMENT_FIELDS, add_lora_rows_, has_lora_rows
from forkkv_kernels.ops.qk_norm import inverse_rms, key_scale
from torch import Tensor

from forkkv_cluster.engine.adapter_tables import Table
from forkkv_cluster.engine.adapters import AdapterSlots, LayerLora
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.linear import Linear
from forkkv_cluster.engine.layers.lora import FusedLora
from forkkv_cluster.engine.step_inputs import ResidualRows, StepInputs

MAX_SHORT_ROWS = 16
"""Rows of a segment up to which it counts as short: with more, products of their own pay for their calls. An estimate, not
swept."""


class Product(NamedTuple):
    """What a linear and its adapters give, as summands [T, fused out]: who reads it adds ``added``, where that is not None."""

    out: Tensor
    added: Tensor | None = None

    def whole(self) -> Tensor:
        return self.out if self.added is None else self.out + self.added


class StepAdapters(Protocol):
    """A step's linears with what its adapters add to them, layer by layer."""

    def linear(self, index: int, group: str, base: Linear, x: Tensor) -> Product:
        """``base`` and LoRA of layer ``index`` on x [T, in]; group is ``qkv``, ``o``, ``gate_up`` or ``down``. k and v change
        in merged rows only."""
        ...

    def store_residuals(self, index: int, x: Tensor, k: Tensor) -> None:
        """x A_k and x A_v of every residual write of the step; k [T, Hkv, D] before its norm. After the layer's qkv."""
        ...


class StepLora:
    """``StepAdapters`` segment by segment."""

    def __init__(
        self, step: StepInputs, adapters: AdapterSlots, kv: KVBuffers, dtype: torch.dtype, rms_norm_eps: float
    ) -> None:
        self._step = step
        self._adapters, self._kv, self._eps = adapters, kv, rms_norm_eps
        self._shrunk: list[Tensor | None] = []
        self._weights = [adapters[segment.adapter_slot] for segment in step.lora]
        self._tables: dict[str, Table] | None = None
        if _is_one_call(step, dtype):
            self._tables = _segment_tables(step, adapters)

    def linear(self, index: int, group: str, base: Linear, x: Tensor) -> Product:
        """LoRA is added in place."""
        out = base(x)
        self._add_(index, group, out, x)
        return Product(out)

    def _add_(self, index: int, group: str, out: Tensor, x: Tensor) -> None:
        if self._tables is not None:
            self._add_rows_(index, group, out, x)
        elif group == "qkv":
            self._shrunk = [self._add_qkv_(out, x, number, layer.qkv) for number, layer in enumerate(self._layers(index))]
        else:
            for segment, layer in zip(self._step.lora, self._layers(index), strict=True):
                factors = layer.by_group()[group]
                if factors is not None:
                    factors.apply_(out[segment.rows], x[segment.rows])

    def store_residuals(self, index: int, x: Tensor, k: Tensor) -> None:
        """A segment's own shrink is used again where it has the products."""
        for write in self._step.residual_writes:
            weights = self._adapters[write.adapter_slot]
            lora = weights.layers[index]
            if lora.qkv is None or (lora.k is None and lora.v is None):
                continue
            product, rank_offset = _residual_product(x, write, self._shrunk, lora)
            pools = self._kv.residual(index, self._kv.geometry.rank_class(weights.residual_rank))
            for pool, part in zip(pools, (lora.k, lora.v), strict=True):
                if part is not None:
                    columns = slice(part.rank_start - rank_offset, part.rank_end - rank_offset)
                    pool[:, : part.rank][write.slots] = product[:, columns]
        self._store_key_scales(index, k)

    def _store_key_scales(self, index: int, k: Tensor) -> None:
        """Beside x A_k of every residual write. Rows that write a residual never have theirs merged."""
        writes = [w for w in self._step.residual_writes if self._adapters[w.adapter_slot].layers[index].has_key_scale]
        if not writes:
            return
        base_norm = inverse_rms(k, self._eps)
        for write in writes:
            weights = self._adapters[write.adapter_slot]
            lora = weights.layers[index]
            assert lora.k is not None
            pools = self._kv.residual(index, self._kv.geometry.rank_class(weights.residual_rank))
            a_k = pools[0][:, : lora.k.rank][write.slots]
            scale = key_scale(k[write.rows], base_norm[write.rows], a_k, lora.k.b, self._eps)
            norm, change = lora.key_scale_columns(pools, self._kv.geometry.num_kv_heads)
            norm[write.slots], change[write.slots] = scale.norm.to(k.dtype), scale.change.to(k.dtype)

    def _layers(self, index: int) -> list[LayerLora]:
        return [weights.layers[index] for weights in self._weights]

    def _add_rows_(self, index: int, group: str, out: Tensor, x: Tensor) -> None:
        assert self._tables is not None
        if group in self._tables:
            segments = self._tables[group][index]
            add_lora_rows_(out, x, segments.ctypes.data, len(segments))

    def _add_qkv_(self, qkv: Tensor, x: Tensor, number: int, lora: FusedLora | None) -> Tensor | None:
        if lora is None:
            return None
        segment = self._step.lora[number]
        shrunk = lora.shrink(x[segment.rows])
        lora.expand_(qkv[segment.rows], shrunk, "q_proj")
        if segment.merged is None:
            for module in ("k_proj", "v_proj"):
                lora.expand_(qkv[segment.rows], shrunk, module)
        elif len(segment.merged):
            some = qkv[segment.rows][segment.merged]
            for module in ("k_proj", "v_proj"):
                lora.expand_(some, shrunk[segment.merged], module)
            qkv[segment.rows][segment.merged] = some
        return shrunk


def _is_one_call(step: StepInputs, dtype: torch.dtype) -> bool:
    """Short segments whose rows all run alike."""
    is_alike = not step.residual_writes and all(segment.merged is None for segment in step.lora)
    is_short = bool(step.lora) and max(s.row_end - s.row_start for s in step.lora) <= MAX_SHORT_ROWS
    return is_short and is_alike and has_lora_rows(step.token_ids.device, dtype)


def _segment_tables(step: StepInputs, adapters: AdapterSlots) -> dict[str, Table]:
    """By group [L, n, LORA_SEGMENT_FIELDS] of the adapters that target it."""
    by_group: dict[str, list[Table]] = {}
    for segment in step.lora:
        for group, rows in adapters.tables(segment.adapter_slot).lora.items():
            own = rows.copy()
            own[:, : LORA_SEGMENT_FIELDS.index("rank")] = (segment.row_start, segment.row_end)
            by_group.setdefault(group, []).append(own)
    return {group: np.stack(tables, axis=1) for group, tables in by_group.items()}


def _residual_product(x: Tensor, write: ResidualRows, shrunk: list[Tensor | None], lora: LayerLora) -> tuple[Tensor, int]:
    """x [A_k | A_v] of the write's rows, and the rank at which its first column starts."""
    ready = shrunk[write.segment] if write.segment is not None else None
    if ready is not None:
        return ready[write.segment_rows], 0
    first = min(part.rank_start for part in (lora.k, lora.v) if part is not None)
    assert lora.qkv is not None
    return lora.qkv.shrink_from(x[write.rows], first), first
