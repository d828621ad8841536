"""How a step looks on the device: scheduled items in, one ``Batch`` out. Pure; reads leases, mutates nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forkkv_cluster.cache.leases import SequenceLease
from forkkv_cluster.cache.swaps import NO_SWAPS, SwapPlan
from forkkv_cluster.engine.batch import (
    AttentionSpan,
    Batch,
    IntArray,
    LoraSegment,
    PageArray,
    ResidualRead,
    ResidualWrite,
    TailCopy,
)
from forkkv_cluster.engine.sequence import ContextPass, PassKind, Scheduled, Turn

_NO_ROWS: IntArray = np.zeros(0, dtype=np.int64)


def in_row_order(work: Sequence[Scheduled]) -> list[Scheduled]:
    """Rows of one adapter side by side, rows of the base model first: LoRA then runs over few long segments."""
    return sorted(work, key=_first_slot)


def _first_slot(scheduled: Scheduled) -> int:
    slot = scheduled.item.active_slot
    return -1 if slot is None or scheduled.lora_start == scheduled.end else slot


def build_batch(work: Sequence[Scheduled], page_size: int, swaps: SwapPlan = NO_SWAPS) -> Batch:
    """``work`` in row order (``in_row_order``) as one forward pass. Logit rows follow the order of finishing turns."""
    builder = _Builder(page_size)
    for scheduled in work:
        builder.add(scheduled)
    return builder.build(swaps)


class _Builder:
    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._num_rows = 0
        self._tokens: list[IntArray] = []
        self._positions: list[IntArray] = []
        self._base_rows: list[IntArray] = []
        self._base_slots: list[IntArray] = []
        self._plain_rows: list[IntArray] = []
        self._segments: list[LoraSegment] = []
        self._writes: dict[int, tuple[list[IntArray], list[IntArray]]] = {}
        self._spans: list[AttentionSpan] = []
        self._logit_rows: list[int] = []
        self._scored: list[tuple[IntArray, IntArray]] = []
        self._num_top_scores = 0
        self._copies: list[TailCopy] = []

    def add(self, scheduled: Scheduled) -> None:
        item, start, end = scheduled.item, scheduled.start, scheduled.end
        row = self._num_rows
        positions = np.arange(start, end, dtype=np.int64)
        rows = np.arange(row, row + len(positions), dtype=np.int64)
        tokens = item.tokens if isinstance(item, Turn) else item.lease.record.tokens
        self._tokens.append(tokens[start:end].astype(np.int64))
        self._positions.append(positions)
        self._num_rows += len(positions)
        self._add_segment(item.active_slot, row + scheduled.lora_start - start, self._num_rows)
        if isinstance(item, Turn):
            self._add_turn(item, rows, positions, scheduled)
        else:
            self._add_pass(item, rows, positions, scheduled)

    def _add_segment(self, slot: int | None, start: int, end: int) -> None:
        if slot is None or start == end:
            return
        if self._segments and self._segments[-1].adapter_slot == slot and self._segments[-1].row_end == start:
            start = self._segments.pop().row_start
        self._segments.append(LoraSegment(slot, start, end))

    def _add_turn(self, turn: Turn, rows: IntArray, positions: IntArray, scheduled: Scheduled) -> None:
        lease = turn.lease
        if lease is None:
            raise ValueError(f"turn {turn.request_id} is scheduled without pages")
        self._write_base(rows, positions, lease.pages)
        read = None
        if turn.adapter is not None and len(lease.residual_pages):
            read = ResidualRead(
                turn.adapter.slot, lease.residual_pages, len(lease.residual_pages) * self._page_size, lease.merged_keys
            )
        self._add_span(rows, scheduled, lease.pages, read)
        if lease.tail is not None:
            self._copies.append(self._tail_copy(turn, lease))
        if scheduled.end == turn.num_tokens:
            self._logit_rows.append(int(rows[-1]))
        if scored := scheduled.scored:
            where = np.arange(scored.start, scored.stop) - scheduled.start - 1
            self._scored.append((rows[where], turn.tokens[scored.start : scored.stop].astype(np.int64)))
            self._num_top_scores = max(self._num_top_scores, turn.request.sampling.prompt_logprobs or 0)

    def _tail_copy(self, turn: Turn, lease: SequenceLease) -> TailCopy:
        tail = lease.tail
        if tail is None or tail.node.page is None:
            raise ValueError(f"turn {turn.request_id} has no tail to copy")
        merged = tail.is_context and tail.residual is not None and turn.adapter is not None
        return TailCopy(
            source_page=tail.node.page,
            target_page=int(lease.pages[lease.num_blocks_in_tree]),
            num_tokens=tail.num_tokens,
            start_pos=lease.num_blocks_in_tree * self._page_size,
            adapter_slot=turn.adapter.slot if merged and turn.adapter is not None else None,
            residual_page=tail.residual.page if merged and tail.residual is not None else None,
        )

    def _add_pass(self, item: ContextPass, rows: IntArray, positions: IntArray, scheduled: Scheduled) -> None:
        lease = item.lease
        is_new = positions >= lease.base_start
        self._write_base(rows[is_new], positions[is_new], lease.pages)
        if item.kind is PassKind.FIRST_WRITER:
            self._plain_rows.append(rows[is_new])
        read = None
        for plan in lease.residuals:
            slot = item.targets[plan.key].slot
            is_written = positions >= plan.start
            where = self._slots(positions[is_written], plan.pages)
            written = self._writes.setdefault(slot, ([], []))
            written[0].append(rows[is_written])
            written[1].append(where)
            if item.kind is not PassKind.BASE and slot == item.active_slot:
                read = ResidualRead(slot, self._pages(plan.pages, scheduled.end), scheduled.end)
        self._add_span(rows, scheduled, lease.pages, read)

    def _add_span(self, rows: IntArray, scheduled: Scheduled, pages: PageArray, read: ResidualRead | None) -> None:
        first = int(rows[0])
        table = self._pages(pages, scheduled.end)
        self._spans.append(AttentionSpan(first, first + len(rows), scheduled.start, table, read))

    def _write_base(self, rows: IntArray, positions: IntArray, pages: PageArray) -> None:
        self._base_rows.append(rows)
        self._base_slots.append(self._slots(positions, pages))

    def _slots(self, positions: IntArray, pages: PageArray) -> IntArray:
        blocks = positions // self._page_size
        return pages[blocks].astype(np.int64) * self._page_size + positions % self._page_size

    def _pages(self, pages: PageArray, num_tokens: int) -> PageArray:
        return pages[: -(-num_tokens // self._page_size)]

    def build(self, swaps: SwapPlan) -> Batch:
        return Batch(
            token_ids=_join(self._tokens),
            positions=_join(self._positions),
            base_rows=_join(self._base_rows),
            base_slots=_join(self._base_slots),
            plain_rows=_join(self._plain_rows),
            lora_segments=tuple(self._segments),
            residual_writes=tuple(
                ResidualWrite(slot, _join(rows), _join(slots)) for slot, (rows, slots) in self._writes.items()
            ),
            attention=tuple(self._spans),
            logit_rows=np.array(self._logit_rows, dtype=np.int64),
            tail_copies=tuple(self._copies),
            scored_rows=_join([rows for rows, _ in self._scored]),
            scored_tokens=_join([tokens for _, tokens in self._scored]),
            num_top_scores=self._num_top_scores,
            swap_outs=swaps.outs,
            swap_ins=swaps.ins,
        )


def _join(parts: list[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else _NO_ROWS
