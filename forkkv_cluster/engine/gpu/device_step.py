"""One step on the device: tables filled on the host, moved in one copy, read by every layer's kernels.

A step that only decodes is captured as a CUDA graph once for its sizes, and replayed with other numbers in the same tables.
Without a GPU the same tables go through the references, or through Triton's interpreter: tests run what a GPU runs, but for
the capture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from forkkv_kernels.reference.rope_basis import rope_basis
from torch import Tensor

from forkkv_cluster.engine.adapters import AdapterSlots
from forkkv_cluster.engine.batch import Batch
from forkkv_cluster.engine.gpu.adapter_stacks import AdapterStacks
from forkkv_cluster.engine.gpu.packed_tables import PackedTables
from forkkv_cluster.engine.gpu.side_stream import SideStream
from forkkv_cluster.engine.gpu.step_plan import StepPlan
from forkkv_cluster.engine.gpu.step_sizes import MAX_DECODE_ROWS, StepSizes
from forkkv_cluster.engine.gpu.tabled_attention import TabledAttention
from forkkv_cluster.engine.gpu.tiled_lora import TiledLora
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.rotary import RotaryTable
from forkkv_cluster.engine.models.decoder import Decoder
from forkkv_cluster.engine.step_inputs import StepRows

COLUMNS, COLUMNS_WITH_RESIDUAL = 64, 32
"""Query heads of a kv head, of all members of a run together: the fastest of those tried on an H100 (kernels/RESULTS.md)."""
RESIDUAL_COLUMNS = 128
"""Residual values of a position, of all members together, that a program has room for."""

MAX_GRAPHS = 64
"""Captured at once; the least recently used goes first. They share one pool of memory."""


class DeviceStep:
    """Runs batches of one model over one arena."""

    def __init__(self, model: Decoder, kv: KVBuffers, adapters: AdapterSlots, rotary: RotaryTable) -> None:
        self._model, self._kv, self._adapters, self._rotary = model, kv, adapters, rotary
        self._device = kv.arena.device
        self._stacks = AdapterStacks(model.config, kv.geometry, kv.arena.dtype, self._device)
        self._captured: OrderedDict[StepSizes, _Captured] = OrderedDict()  # most recently used last
        is_cuda = self._device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if is_cuda else None
        self._capturing = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._side = SideStream(self._device)
        self._version = 0
        exact = torch.float32 if kv.arena.dtype == torch.float32 else torch.float16
        self._basis = rope_basis(rotary.rows, exact)

    def forward(self, batch: Batch) -> Tensor:
        """Run all rows, write their KV; last hidden states [R + n, H] of logit and scored rows. Valid until the next step."""
        self._hold_adapters(batch)
        plan = StepPlan.of(batch, self._kv.geometry.page_size, self._max_members(batch))
        sizes = StepSizes.of(plan, self._kv.geometry.num_kv_heads)
        if sizes.only_decodes and sizes.num_rows <= MAX_DECODE_ROWS:
            return self._decode(plan, sizes)
        tables = PackedTables(sizes.shapes(), self._device)
        sizes.fill(tables.host, plan)
        tables.upload()
        return self._run(sizes, tables.device)

    def _max_members(self, batch: Batch) -> int:
        """Of a shared run, by the columns that their query heads make in a program, and by their residual rows side by side."""
        if self._kv.geometry.page_size.bit_count() > 1:
            return 1  # the kernel for shared runs goes by pages of a power of two
        columns_of_one = 1 << (self._model.config.num_heads // self._model.config.num_kv_heads - 1).bit_length()
        if any(span.residual is not None for span in batch.attention):
            by_rank = RESIDUAL_COLUMNS // self._stacks.residual_rank
            return max(1, min(COLUMNS_WITH_RESIDUAL // columns_of_one, by_rank))
        return max(1, COLUMNS // columns_of_one)

    def release(self, slot: int) -> None:
        """The adapter of that slot has left."""
        self._stacks.release(slot)

    def _hold_adapters(self, batch: Batch) -> None:
        slots = {segment.adapter_slot for segment in batch.lora_segments}
        slots |= {write.adapter_slot for write in batch.residual_writes}
        slots |= {span.residual.adapter_slot for span in batch.attention if span.residual is not None}
        for slot in sorted(slots):
            self._stacks.hold(slot, self._adapters[slot])
        if self._stacks.version != self._version:
            self._version = self._stacks.version
            self._captured.clear()

    def _decode(self, plan: StepPlan, sizes: StepSizes) -> Tensor:
        rounded = sizes.rounded(self._stacks.num_slots)
        step = self._captured.get(rounded)
        if step is None:
            step = self._captured[rounded] = _Captured(PackedTables(rounded.shapes(), self._device))
            if len(self._captured) > MAX_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(rounded)
        rounded.fill(step.tables.host, plan)
        step.tables.upload()
        if self._device.type != "cuda":
            return self._run(rounded, step.tables.device, self._side)[: sizes.num_outputs]
        if step.graph is None:
            self._capture(step, rounded)
        assert step.graph is not None
        assert step.hidden is not None
        step.graph.replay()
        return step.hidden[: sizes.num_outputs]

    def _capture(self, step: _Captured, sizes: StepSizes) -> None:
        """Runs the step first, on a stream of its own: kernels are compiled, libraries take their workspaces."""
        assert self._capturing is not None
        self._capturing.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._capturing):
            self._run(sizes, step.tables.device, self._side)
        torch.cuda.current_stream(self._device).wait_stream(self._capturing)
        step.graph = torch.cuda.CUDAGraph()
        # Another thread may read an adapter meanwhile, and ask the device for something.
        with torch.cuda.graph(step.graph, pool=self._pool, stream=self._capturing, capture_error_mode="thread_local"):
            step.hidden = self._run(sizes, step.tables.device, self._side)

    def _run(self, sizes: StepSizes, tables: Mapping[str, Tensor], side: SideStream | None = None) -> Tensor:
        rows = StepRows(
            token_ids=tables["token_ids"].long(),
            cos_sin=self._rotary.rows[tables["positions"].long()],
            base_slots=tables["base_slots"].long(),
            output_rows=tables["output_rows"].long(),
        )
        has_key_scale = self._model.config.qk_norm
        attention = TabledAttention(sizes, tables, self._stacks, self._kv, self._rotary, self._basis, has_key_scale)
        lora = TiledLora(tables, sizes.lora, sizes.writes, self._stacks, self._kv, self._model.config, side)
        return self._model.forward(rows, attention, lora, self._kv)


@dataclass(slots=True, eq=False)
class _Captured:
    """Tables of one size; the graph that reads them, once it was captured, and where it leaves the hidden states."""

    tables: PackedTables
    graph: torch.cuda.CUDAGraph | None = None
    hidden: Tensor | None = None
