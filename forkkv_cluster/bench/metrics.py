"""What a run measured, and the one JSON object that reports it. Pure: times come from the caller.

All times are seconds from the run's start unless named otherwise; the first event's due time is the zero of the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np

from forkkv_cluster.core.request import PrefixUsage
from forkkv_cluster.core.status import EngineCounters

_PERCENTILES = (50, 90, 99)


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p99 (linear interpolation) and mean; None for each where there is no value."""
    if not values:
        return {**{f"p{p}": None for p in _PERCENTILES}, "mean": None}
    array = np.asarray(values, dtype=np.float64)
    return {**{f"p{p}": float(np.percentile(array, p)) for p in _PERCENTILES}, "mean": float(array.mean())}


@dataclass(slots=True)
class TurnRecord:
    """One turn as it runs. ``token_times_s`` has one entry for each of ``token_ids``."""

    id: str
    branch: str
    adapter: str | None
    due_s: float
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    usage: PrefixUsage = field(default_factory=PrefixUsage)
    worker: str = ""

    def add_tokens(self, token_ids: Iterable[int], now_s: float) -> None:
        """Tokens that arrived together. The gap before them is spread over them evenly: a chunk of n tokens after g
        seconds counts as n gaps of g / n, so that coalescing does not show as zero latency. A first chunk has no gap."""
        new = list(token_ids)
        if not new:
            return
        previous_s = self.token_times_s[-1] if self.token_times_s else now_s
        gap_s = (now_s - previous_s) / len(new)
        self.token_ids.extend(new)
        self.token_times_s.extend(previous_s + gap_s * (k + 1) for k in range(len(new)))

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.due_s

    @property
    def e2e_s(self) -> float:
        return self.token_times_s[-1] - self.due_s

    @property
    def itl_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]

    @property
    def tpot_s(self) -> float | None:
        """(e2e - TTFT) / (output tokens - 1); None for a turn of one token."""
        return (self.e2e_s - self.ttft_s) / (len(self.token_ids) - 1) if len(self.token_ids) > 1 else None

    def to_json(self, zero_s: float) -> dict[str, Any]:
        return {
            "id": self.id,
            "branch": self.branch,
            "adapter": self.adapter,
            "start_s": self.due_s - zero_s,
            "ttft_s": self.ttft_s,
            "e2e_s": self.e2e_s,
            "output_tokens": len(self.token_ids),
            **asdict(self.usage),
            "worker": self.worker,
        }


@dataclass(slots=True)
class RunRecord:
    """A run as it goes: its turns in the order in which they started, and when its first event was due."""

    turns: list[TurnRecord] = field(default_factory=list)
    first_due_s: float | None = None

    def event_started(self, due_s: float) -> None:
        self.first_due_s = due_s if self.first_due_s is None else min(self.first_due_s, due_s)

    @property
    def zero_s(self) -> float:
        return self.first_due_s or 0.0

    @property
    def wall_s(self) -> float:
        """First event due to last token: context passes and joins included, loading and warm-up not."""
        return max((turn.token_times_s[-1] for turn in self.turns), default=self.zero_s) - self.zero_s


def counters_between(before: EngineCounters, after: EngineCounters) -> EngineCounters:
    """What happened between two readings. Peaks are levels, not counts: the later reading stands."""
    values = {
        f.name: getattr(after, f.name) - (0 if f.name.startswith("peak_") else getattr(before, f.name))
        for f in fields(EngineCounters)
    }
    return EngineCounters(**values)


def add_counters(parts: Iterable[EngineCounters]) -> EngineCounters:
    """The sum over workers, peaks too: an upper bound where workers peaked at different times."""
    readings = list(parts)
    return EngineCounters(**{f.name: sum(getattr(part, f.name) for part in readings) for f in fields(EngineCounters)})


@dataclass(frozen=True, slots=True)
class RunConditions:
    """Everything beside the code that the numbers depend on. Names as in the report."""

    trace: str
    trace_sha256: str
    target: str
    model: str
    sharing: str
    writer: str
    dtype: str
    kv_bytes: int
    seed: int
    host: dict[str, Any]
    commit: str


def report(conditions: RunConditions, run: RunRecord, counters: EngineCounters) -> dict[str, Any]:
    """The object of ``--json``, exactly as the trace format's page lists it, with ``target`` beside the model.

    ``counters`` are those of this run alone (see :func:`counters_between`). Hits are summed over turns: what a context pass
    finds of an earlier one saves nothing that a turn would have paid. ``prefill_tokens_run`` counts both.
    """
    output_tokens = sum(len(turn.token_ids) for turn in run.turns)
    wall_s = run.wall_s
    return {
        **asdict(conditions),
        "wall_s": wall_s,
        "output_tokens": output_tokens,
        "output_tokens_per_s": output_tokens / wall_s if wall_s > 0 else None,
        "prefill_tokens_run": counters.prefill_tokens_run,
        "base_hit_tokens": sum(turn.usage.base_hit_tokens for turn in run.turns),
        "residual_hit_tokens": sum(turn.usage.residual_hit_tokens for turn in run.turns),
        "useful_hit_tokens": sum(turn.usage.useful_hit_tokens for turn in run.turns),
        "peak_base_bytes": counters.peak_base_bytes,
        "peak_residual_bytes": counters.peak_residual_bytes,
        "cow_copies": counters.cow_copies,
        "evictions": counters.evictions,
        "preemptions": counters.preemptions,
        "ttft_s": summary([turn.ttft_s for turn in run.turns]),
        "tpot_s": summary([turn.tpot_s for turn in run.turns if turn.tpot_s is not None]),
        "itl_s": summary([gap for turn in run.turns for gap in turn.itl_s]),
        "e2e_s": summary([turn.e2e_s for turn in run.turns]),
        "turns": [turn.to_json(run.zero_s) for turn in run.turns],
    }
