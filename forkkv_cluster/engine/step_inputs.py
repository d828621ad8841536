"""A batch as tensors: built once per step, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forkkv_cluster.engine.batch import Batch, IntArray, LoraSegment
from forkkv_cluster.engine.layers.rotary import RotaryTable


@dataclass(frozen=True, slots=True, eq=False)
class LoraRows:
    """One LoRA segment: rows [row_start, row_end) and, of those, the rows whose own K and V are merged.

    merged [m] int64 counts from row_start; None means all rows, so that a whole segment is written through a view.
    """

    adapter_slot: int
    row_start: int
    row_end: int
    merged: Tensor | None

    @property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_end)


@dataclass(frozen=True, slots=True, eq=False)
class ResidualRows:
    """x A_k and x A_v of ``rows`` go to ``slots`` (each [n] int64, or a slice of consecutive ones).

    ``segment`` and ``segment_rows`` name the LoRA segment of the same adapter that has these products already.
    """

    adapter_slot: int
    rows: Tensor | slice
    slots: Tensor | slice
    segment: int | None
    segment_rows: Tensor | slice


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """token_ids [T] int64; cos_sin [T, D] fp32; base_slots [T] int64: where a row's K and V go, -1 for nowhere;
    output_rows [R + n]: logit and scored rows."""

    token_ids: Tensor
    cos_sin: Tensor
    base_slots: Tensor
    output_rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs(StepRows):
    """The rows, and what of them is the adapters'."""

    lora: tuple[LoraRows, ...]
    residual_writes: tuple[ResidualRows, ...]

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


def step_inputs(batch: Batch, rotary: RotaryTable, device: torch.device) -> StepInputs:
    """Convert ``batch``; consecutive indices become slices, which read and write through views."""
    merged_rows = np.setdiff1d(batch.base_rows, batch.plain_rows)
    segments = tuple(_lora_rows(segment, merged_rows, device) for segment in batch.lora_segments)
    residual_writes = []
    for write in batch.residual_writes:
        segment, segment_rows = _segment_of(write.adapter_slot, write.rows, batch.lora_segments)
        residual_writes.append(
            ResidualRows(
                write.adapter_slot,
                compact(write.rows, device),
                compact(write.slots, device),
                segment,
                compact(segment_rows, device),
            )
        )
    base_slots = np.full(batch.num_rows, -1, dtype=np.int64)
    base_slots[batch.base_rows] = batch.base_slots
    positions = torch.from_numpy(np.ascontiguousarray(batch.positions))
    return StepInputs(
        token_ids=torch.from_numpy(np.ascontiguousarray(batch.token_ids)).to(device),
        cos_sin=rotary.rows[positions.to(device)],
        base_slots=torch.from_numpy(base_slots).to(device),
        lora=segments,
        residual_writes=tuple(residual_writes),
        output_rows=torch.from_numpy(np.concatenate((batch.logit_rows, batch.scored_rows))).to(device),
    )


def compact(indices: IntArray | slice, device: torch.device) -> Tensor | slice:
    """A slice when ``indices`` [n] are consecutive, else an int64 tensor."""
    if isinstance(indices, slice):
        return indices
    if len(indices) and indices[-1] - indices[0] == len(indices) - 1 and (np.diff(indices) == 1).all():
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64)).to(device)


def _lora_rows(segment: LoraSegment, merged_rows: IntArray, device: torch.device) -> LoraRows:
    inside = merged_rows[(merged_rows >= segment.row_start) & (merged_rows < segment.row_end)] - segment.row_start
    merged = None if len(inside) == segment.row_end - segment.row_start else torch.from_numpy(inside).to(device)
    return LoraRows(segment.adapter_slot, segment.row_start, segment.row_end, merged)


def _segment_of(adapter_slot: int, rows: IntArray, segments: tuple[LoraSegment, ...]) -> tuple[int | None, IntArray]:
    for index, segment in enumerate(segments):
        is_inside = len(rows) > 0 and rows.min() >= segment.row_start and rows.max() < segment.row_end
        if segment.adapter_slot == adapter_slot and is_inside:
            return index, rows - segment.row_start
    return None, rows
