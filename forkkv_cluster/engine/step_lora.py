"""The LoRA of one step, layer by layer: segment by segment, or all segments in one product where they are short."""

from __future__ import annotations

import torch
from torch import Tensor

from forkkv_cluster.engine.adapters import AdapterSlots, LayerLora
from forkkv_cluster.engine.layers.lora import FusedLora
from forkkv_cluster.engine.layers.lora_stack import MAX_WASTE, LayerStacks, StackedRows
from forkkv_cluster.engine.step_inputs import StepInputs


class StepLora:
    """Adds x A B to the rows of every LoRA segment."""

    def __init__(self, step: StepInputs, adapters: AdapterSlots, dtype: torch.dtype) -> None:
        self._step = step
        self._weights = [adapters[segment.adapter_slot] for segment in step.lora]
        self._stacks: list[LayerStacks] | None = None
        self._rows: StackedRows | None = None
        if _is_stackable(step, dtype):
            self._stacks = adapters.stacks.get(
                tuple(self._weights), lambda: [[layer.by_group() for layer in weights.layers] for weights in self._weights]
            )
            self._rows = StackedRows(_row_segments(step))

    def qkv_(self, index: int, qkv: Tensor, x: Tensor) -> list[Tensor | None]:
        """qkv [T, Q + 2 KV] of layer ``index`` from x [T, H]. k and v change in merged rows only.

        Returns x [A_q | A_k | A_v] by segment, for residuals; nothing where the step writes none.
        """
        if self._stacks is not None:
            self._stacked_(index, "qkv", qkv, x)
            return []
        return [self._add_qkv_(qkv, x, number, layer.qkv) for number, layer in enumerate(self._layers(index))]

    def add_(self, index: int, group: str, out: Tensor, x: Tensor) -> None:
        """out [T, fused out] of layer ``index`` from x [T, in]; group is ``o``, ``gate_up`` or ``down``."""
        if self._stacks is not None:
            self._stacked_(index, group, out, x)
            return
        for segment, layer in zip(self._step.lora, self._layers(index), strict=True):
            factors = layer.by_group()[group]
            if factors is not None:
                factors.apply_(out[segment.rows], x[segment.rows])

    def _layers(self, index: int) -> list[LayerLora]:
        return [weights.layers[index] for weights in self._weights]

    def _stacked_(self, index: int, group: str, out: Tensor, x: Tensor) -> None:
        if self._stacks is None or self._rows is None:
            return
        stack = self._stacks[index].get(group)
        if stack is not None:
            stack.apply_(out, x, self._rows.foreign(stack))

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


def _is_stackable(step: StepInputs, dtype: torch.dtype) -> bool:
    """Short segments whose rows all run alike. Not in fp16: a B that overflowed there would reach the rows of others."""
    is_alike = not step.residual_writes and all(segment.merged is None for segment in step.lora)
    is_short = len(step.lora) > 1 and step.num_rows * len(step.lora) <= MAX_WASTE
    return is_short and is_alike and dtype != torch.float16


def _row_segments(step: StepInputs) -> Tensor:
    row_segments = torch.full((step.num_rows,), -1, dtype=torch.int64)
    for number, segment in enumerate(step.lora):
        row_segments[segment.rows] = number
    return row_segments.to(step.token_ids.device)
