"""One measured run: checks, warm-up, the trace, and the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forkkv_cluster.bench.environment import commit, host_info
from forkkv_cluster.bench.metrics import RunConditions, RunRecord, counters_between, report
from forkkv_cluster.bench.target import OnProgress, Target, check_runnable
from forkkv_cluster.bench.trace import Trace
from forkkv_cluster.core.request import Sharing


@dataclass(frozen=True, slots=True)
class RunResult:
    """``report`` is the object of ``--json``; ``record`` has every token and its time."""

    report: dict[str, Any]
    record: RunRecord

    def outputs(self) -> list[dict[str, Any]]:
        """What every turn generated: one object a line of ``--outputs``."""
        return [
            {"id": turn.id, "branch": turn.branch, "adapter": turn.adapter, "token_ids": turn.token_ids}
            for turn in self.record.turns
        ]


def run_trace(trace: Trace, target: Target, *, sharing: Sharing, seed: int, on_progress: OnProgress) -> RunResult:
    """Run ``trace`` on an idle ``target``. Raises ForkKVError: a trace that it cannot run, or a turn that failed."""
    check_runnable(trace, target.facts())
    target.warm_up()
    before = target.counters()
    record = target.run(trace, on_progress)
    counters = counters_between(before, target.counters())
    facts = target.facts()
    conditions = RunConditions(
        trace=trace.name,
        trace_sha256=trace.sha256,
        target=facts.name,
        model=facts.model,
        sharing=str(sharing),
        writer=facts.writer,
        dtype=facts.dtype,
        kv_bytes=facts.kv_bytes,
        seed=seed,
        host=host_info(),
        commit=commit(),
    )
    return RunResult(report(conditions, record, counters), record)
