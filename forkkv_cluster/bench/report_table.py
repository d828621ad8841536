"""A report for people: the numbers of the JSON object, as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_TIMES = (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "end to end"))
_BYTES = {"kv_bytes", "peak_base_bytes", "peak_residual_bytes"}
_FACTS = ("target", "model", "sharing", "writer", "dtype", "kv_bytes", "seed", "commit")
_COUNTS = (
    "wall_s",
    "output_tokens",
    "output_tokens_per_s",
    "prefill_tokens_run",
    "base_hit_tokens",
    "residual_hit_tokens",
    "useful_hit_tokens",
    "peak_base_bytes",
    "peak_residual_bytes",
    "cow_copies",
    "evictions",
    "preemptions",
)


def report_tables(report: dict[str, Any]) -> list[Table]:
    """Conditions and counts, then times in milliseconds."""
    counts = Table(title=f"{report['trace']} ({len(report['turns'])} turns)", title_justify="left", show_header=False)
    for name in (*_FACTS, *_COUNTS):
        counts.add_row(name, _shown(name, report[name]))
    times = Table("milliseconds", title_justify="left")
    for column in ("p50", "p90", "p99", "mean"):
        times.add_column(column, justify="right")
    for key, label in _TIMES:
        times.add_row(label, *(_milliseconds(report[key][column]) for column in ("p50", "p90", "p99", "mean")))
    return [counts, times]


def _shown(name: str, value: Any) -> str:
    if name in _BYTES:
        return f"{value / 2**20:,.1f} MiB"
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:,.1f}"
