"""What of a batch decides which kernels run and how large: steps of equal sizes can share one captured graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from forkkv_cluster.engine.batch import AttentionSpan, Batch
from forkkv_cluster.engine.gpu.packed_tables import Int32Array
from forkkv_cluster.engine.gpu.step_tables import SpanSizes, TileSizes, fill_rows, fill_runs, fill_spans, lora_runs, write_runs
from forkkv_cluster.engine.gpu.tiled_lora import LORA, WRITES

DECODE, EXTEND = "decode", "extend"
"""Prefixes of the tables: of sequences with one row, and of those with more."""

MAX_DECODE_ROWS = 512
"""Rows up to which a step that only decodes is captured."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """None: the step has no such sequences, or no such rows. ``num_outputs``: logit and scored rows."""

    num_rows: int
    num_outputs: int
    decode: SpanSizes | None
    extend: SpanSizes | None
    lora: TileSizes | None
    writes: TileSizes | None

    @classmethod
    def of(cls, batch: Batch) -> StepSizes:
        decode, extend = _by_kind(batch)
        lora, writes = ([len(run.rows) for run in runs] for runs in (lora_runs(batch), write_runs(batch)))
        return cls(
            num_rows=batch.num_rows,
            num_outputs=len(batch.logit_rows) + len(batch.scored_rows),
            decode=SpanSizes.of(decode) if decode else None,
            extend=SpanSizes.of(extend) if extend else None,
            lora=TileSizes.of(lora) if lora else None,
            writes=TileSizes.of(writes) if writes else None,
        )

    @property
    def only_decodes(self) -> bool:
        """Whether every row is a sequence's next token, and wanted."""
        return self.extend is None and self.writes is None and self.num_outputs == self.num_rows

    def rounded(self, num_slots: int) -> StepSizes:
        """Of a step that only decodes: room for all that are alike, with up to ``num_slots`` adapters."""
        assert self.decode is not None
        rows = _rounded_rows(self.num_rows)
        residual = self.decode.num_residual_pages
        return StepSizes(
            num_rows=rows,
            num_outputs=rows,
            decode=SpanSizes(rows, _power_of_two(self.decode.num_pages), _power_of_two(residual) if residual else 0),
            extend=None,
            lora=TileSizes.up_to(rows, num_slots) if self.lora is not None else None,
            writes=None,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tables."""
        rows = {"token_ids": (self.num_rows,), "positions": (self.num_rows,), "base_slots": (self.num_rows,)}
        shapes: dict[str, tuple[int, ...]] = {**rows, "output_rows": (self.num_outputs,)}
        for prefix, spans in ((DECODE, self.decode), (EXTEND, self.extend)):
            if spans is not None:
                shapes |= spans.shapes(prefix)
        if self.decode is not None and self.extend is not None:
            shapes |= {f"{DECODE}.rows": (self.decode.num_sequences,)}
            shapes |= {f"{EXTEND}.rows": (self.num_rows - self.decode.num_sequences,)}
        for prefix, tiles in ((LORA, self.lora), (WRITES, self.writes)):
            if tiles is not None:
                shapes |= tiles.shapes(prefix)
        return shapes

    def fill(self, tables: Mapping[str, Int32Array], batch: Batch) -> None:
        """Write ``batch``, which is of these sizes or of smaller ones, into tables of ``shapes``."""
        fill_rows(tables, batch)
        outputs = np.concatenate((batch.logit_rows, batch.scored_rows))
        tables["output_rows"][: len(outputs)] = outputs
        tables["output_rows"][len(outputs) :] = 0
        for prefix, sizes, spans in zip((DECODE, EXTEND), (self.decode, self.extend), _by_kind(batch), strict=True):
            if sizes is not None:
                fill_spans(tables, prefix, spans)
                if f"{prefix}.rows" in tables:
                    rows = [np.arange(span.row_start, span.row_end) for span in spans]
                    tables[f"{prefix}.rows"][:] = np.concatenate(rows)
        for prefix, tiles, runs in ((LORA, self.lora, lora_runs(batch)), (WRITES, self.writes, write_runs(batch))):
            if tiles is not None:
                fill_runs(tables, prefix, runs, tiles.height)


def _by_kind(batch: Batch) -> tuple[list[AttentionSpan], list[AttentionSpan]]:
    """Sequences with one row, and those with more."""
    spans = [span for span in batch.attention if span.num_rows]
    return [span for span in spans if span.num_rows == 1], [span for span in spans if span.num_rows > 1]


def _rounded_rows(num_rows: int) -> int:
    """Powers of two up to 16, then multiples of 8 up to 64, then of 32: at most a quarter more rows than there are."""
    if num_rows <= 16:
        return _power_of_two(num_rows)
    step = 8 if num_rows <= 64 else 32
    return -(-num_rows // step) * step


def _power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()
