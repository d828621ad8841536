"""A batch sorted by what its rows need of the device: made once a step, read for the sizes and for the numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forkkv_cluster.engine.batch import AttentionSpan, Batch, IntArray
from forkkv_cluster.engine.gpu.shared_runs import SharedRun, find_shared_runs
from forkkv_cluster.engine.gpu.step_tables import Run, lora_runs, write_runs


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """decode: sequences with one row, extend: those with more. shared: runs of pages that several of ``decode`` read;
    own_starts [len(decode)]: the first token behind them. lora: rows that run with an adapter, writes: whose residual is kept.
    """

    batch: Batch
    decode: list[AttentionSpan]
    extend: list[AttentionSpan]
    shared: list[SharedRun]
    own_starts: IntArray
    lora: list[Run]
    writes: list[Run]

    @classmethod
    def of(cls, batch: Batch, page_size: int, max_members: int) -> StepPlan:
        """``max_members``: of a shared run."""
        spans = [span for span in batch.attention if span.num_rows]
        decode = [span for span in spans if span.num_rows == 1]
        shared, own_starts = find_shared_runs(decode, page_size, max_members)
        extend = [span for span in spans if span.num_rows > 1]
        return cls(batch, decode, extend, shared, own_starts, lora_runs(batch), write_runs(batch))

    @property
    def longest_own(self) -> int:
        """Tokens that a sequence of ``decode`` reads by itself, at most."""
        return max((span.kv_len - int(start) for span, start in zip(self.decode, self.own_starts, strict=True)), default=0)

    @property
    def longest_run(self) -> int:
        return max((run.end - run.start for run in self.shared), default=0)

    @property
    def output_rows(self) -> IntArray:
        """Logit and scored rows."""
        return np.concatenate((self.batch.logit_rows, self.batch.scored_rows))
