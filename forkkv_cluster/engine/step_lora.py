"""The LoRA of one step, layer by layer: segment by segment, or all segments in one call where they are short."""

from __future__ import annotations

import numpy as np
import torch
from forkkv_kernels.ops.lora import LORA_SEGMENT_FIELDS, add_lora_rows_, has_lora_rows
from torch import Tensor

from forkkv_cluster.engine.adapter_tables import Table
from forkkv_cluster.engine.adapters import AdapterSlots, LayerLora
from forkkv_cluster.engine.layers.lora import FusedLora
from forkkv_cluster.engine.step_inputs import StepInputs

MAX_SHORT_ROWS = 16
"""Rows of a segment up to which it counts as short: with more, products of their own pay for their calls. An estimate, not
swept."""


class StepLora:
    """Adds x A B to the rows of every LoRA segment."""

    def __init__(self, step: StepInputs, adapters: AdapterSlots, dtype: torch.dtype) -> None:
        self._step = step
        self._weights = [adapters[segment.adapter_slot] for segment in step.lora]
        self._tables: dict[str, Table] | None = None
        if _is_one_call(step, dtype):
            self._tables = _segment_tables(step, adapters)

    def qkv_(self, index: int, qkv: Tensor, x: Tensor) -> list[Tensor | None]:
        """qkv [T, Q + 2 KV] of layer ``index`` from x [T, H]. k and v change in merged rows only.

        Returns x [A_q | A_k | A_v] by segment, for residuals; nothing where the step writes none.
        """
        if self._tables is not None:
            self._add_rows_(index, "qkv", qkv, x)
            return []
        return [self._add_qkv_(qkv, x, number, layer.qkv) for number, layer in enumerate(self._layers(index))]

    def add_(self, index: int, group: str, out: Tensor, x: Tensor) -> None:
        """out [T, fused out] of layer ``index`` from x [T, in]; group is ``o``, ``gate_up`` or ``down``."""
        if self._tables is not None:
            self._add_rows_(index, group, out, x)
            return
        for segment, layer in zip(self._step.lora, self._layers(index), strict=True):
            factors = layer.by_group()[group]
            if factors is not None:
                factors.apply_(out[segment.rows], x[segment.rows])

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
