"""What of a step decides which kernels run and how large: steps of equal sizes can share one captured graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forkkv_cluster.engine.batch import AttentionSpan
from forkkv_cluster.engine.gpu.packed_tables import Int32Array
from forkkv_cluster.engine.gpu.step_plan import StepPlan
from forkkv_cluster.engine.gpu.step_tables import (
    RunSizes,
    SpanSizes,
    TileSizes,
    fill_rows,
    fill_runs,
    fill_shared_runs,
    fill_spans,
)

DECODE, EXTEND = "decode", "extend"
"""Prefixes of the tables: of sequences with one row, and of those with more."""
LORA, WRITES = "lora", "writes"
"""Of rows that run with an adapter, and of rows whose residual is written."""

MAX_DECODE_ROWS = 512
"""Rows up to which a step that only decodes is captured."""

_PROGRAMS = 264
"""Programs that attention is cut into, about: two for each multiprocessor of an H100 or H200."""
_MIN_SPLIT_TOKENS, _MAX_SPLITS = 256, 64


@dataclass(frozen=True, slots=True)
class Splits:
    """Into how many parts the keys are cut: those that a row reads by itself, and those of a shared run."""

    own: int
    run: int


@dataclass(frozen=True, slots=True)
class StepSizes:
    """None: the step has no such sequences, or no such rows. ``num_outputs``: logit and scored rows."""

    num_rows: int
    num_outputs: int
    decode: SpanSizes | None
    extend: SpanSizes | None
    shared: RunSizes | None
    splits: Splits
    lora: TileSizes | None
    writes: TileSizes | None

    @classmethod
    def of(cls, plan: StepPlan, num_kv_heads: int) -> StepSizes:
        lora, writes = ([len(run.rows) for run in runs] for runs in (plan.lora, plan.writes))
        shared = RunSizes.of(plan.shared) if plan.shared else None
        return cls(
            num_rows=plan.batch.num_rows,
            num_outputs=len(plan.output_rows),
            decode=SpanSizes.of(plan.decode) if plan.decode else None,
            extend=SpanSizes.of(plan.extend) if plan.extend else None,
            shared=shared,
            splits=Splits(
                _num_splits(len(plan.decode) * num_kv_heads, plan.longest_own),
                _num_splits(len(plan.shared) * num_kv_heads, plan.longest_run),
            ),
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
        shared = self.shared
        if shared is not None:
            groups, subgroups = _power_of_two(shared.num_groups), _power_of_two(shared.num_subgroups)
            shared = RunSizes(groups, shared.num_members, subgroups, shared.depth, _power_of_two(shared.end))
        return StepSizes(
            num_rows=rows,
            num_outputs=rows,
            decode=SpanSizes(rows, _power_of_two(self.decode.num_pages), _power_of_two(residual) if residual else 0),
            extend=None,
            shared=shared,
            splits=self.splits,
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
        if self.decode is not None:
            shapes |= {f"{DECODE}.kv_starts": (self.decode.num_sequences,)}
            if self.shared is not None:
                shapes |= self.shared.shapes(DECODE)
        if self.decode is not None and self.extend is not None:
            shapes |= {f"{DECODE}.rows": (self.decode.num_sequences,)}
            shapes |= {f"{EXTEND}.rows": (self.num_rows - self.decode.num_sequences,)}
        for prefix, tiles in ((LORA, self.lora), (WRITES, self.writes)):
            if tiles is not None:
                shapes |= tiles.shapes(prefix)
        return shapes

    def fill(self, tables: Mapping[str, Int32Array], plan: StepPlan) -> None:
        """Write ``plan``, which is of these sizes or of smaller ones, into tables of ``shapes``."""
        fill_rows(tables, plan.batch)
        outputs = plan.output_rows
        tables["output_rows"][: len(outputs)] = outputs
        tables["output_rows"][len(outputs) :] = 0
        if self.decode is not None:
            self._fill_spans(tables, DECODE, plan.decode)
            tables[f"{DECODE}.kv_starts"][: len(plan.decode)] = plan.own_starts
            tables[f"{DECODE}.kv_starts"][len(plan.decode) :] = 0
            if self.shared is not None:
                fill_shared_runs(tables, DECODE, plan.shared, self.splits.own, self.splits.run)
        if self.extend is not None:
            self._fill_spans(tables, EXTEND, plan.extend)
        for prefix, tiles, runs in ((LORA, self.lora, plan.lora), (WRITES, self.writes, plan.writes)):
            if tiles is not None:
                fill_runs(tables, prefix, runs, tiles.height)

    def _fill_spans(self, tables: Mapping[str, Int32Array], prefix: str, spans: Sequence[AttentionSpan]) -> None:
        fill_spans(tables, prefix, spans)
        if f"{prefix}.rows" in tables:
            tables[f"{prefix}.rows"][:] = np.concatenate([np.arange(span.row_start, span.row_end) for span in spans])


def _num_splits(num_programs: int, longest: int) -> int:
    """A power of two, so that few numbers of splits are captured."""
    if num_programs == 0 or longest == 0:
        return 1
    wanted = min(_PROGRAMS // num_programs, longest // _MIN_SPLIT_TOKENS, _MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def _rounded_rows(num_rows: int) -> int:
    """Powers of two up to 16, then multiples of 8 up to 64, then of 32: at most a quarter more rows than there are."""
    if num_rows <= 16:
        return _power_of_two(num_rows)
    step = 8 if num_rows <= 64 else 32
    return -(-num_rows // step) * step


def _power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()
