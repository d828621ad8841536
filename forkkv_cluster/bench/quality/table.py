"""Rows as a table on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from forkkv_cluster.bench.quality.comparison import Row
from forkkv_cluster.bench.quality.stats import Interval
from forkkv_cluster.bench.quality.summary import Summary, summaries, whole

__all__ = ["COLUMNS", "SUMMARY_COLUMNS", "cells_of", "points", "policy_name", "quality_tables", "summary_cells", "title_of"]

COLUMNS = (
    "policy", "first", "context", "n", "accuracy", "loss, points", "F1", "agreement", "KL", "identical", "shared", "as alone",
    "K / V / hidden",
)  # fmt: skip
"""Of one row; the adapter heads its table."""

_NARROW = ("policy", "first", "n", "accuracy", "loss, points", "shared")
"""What a terminal of 80 columns has room for; the reports have all."""

SUMMARY_COLUMNS = (
    "policy", "adapters", "n", "loss, points", "worst", "its loss, points", "within zero", "that share", "context shared",
)  # fmt: skip
_NARROW_SUMMARY = ("policy", "adapters", "loss, points", "worst", "that share", "context shared")


def quality_tables(rows: Sequence[Row]) -> list[Table]:
    """One over all adapters, and one for each, of the rows over all lengths: the reports have the others."""
    by_adapter: dict[str, list[Row]] = {}
    for row in whole(rows):
        by_adapter.setdefault(row.adapter, []).append(row)
    tables = [
        _table(title_of(own[0]), _NARROW, [dict(zip(COLUMNS, cells_of(row), strict=True)) for row in own])
        for own in by_adapter.values()
    ]
    totals = [dict(zip(SUMMARY_COLUMNS, summary_cells(entry), strict=True)) for entry in summaries(rows)]
    return [*tables, _table("all adapters", _NARROW_SUMMARY, totals)]


def _table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for column in columns:
        is_name = column in ("policy", "first", "worst")
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def title_of(row: Row) -> str:
    """What heads the tables of the row's adapter."""
    against = f", held against {row.reference} isolated" if row.reference != row.adapter else ""
    return f"{row.adapter} (rank {row.lora_rank}{against})"


def policy_name(row: Row) -> str:
    """With how ``auto`` was served, and with who wrote where that is not the base model."""
    served = f" ({row.served})" if row.served else ""
    return f"{row.policy}{served}" if row.writer == "canonical" else f"{row.policy}, first writes"


def cells_of(row: Row) -> list[str]:
    """The texts of ``COLUMNS``."""
    return [
        policy_name(row),
        "itself" if row.is_first else row.first,
        f"{row.context_tokens:,}" if row.context_tokens else "all",
        f"{row.num_samples:,}",
        percent(row.accuracy),
        points(row.accuracy_loss) if not row.is_reference else "",
        percent(row.f1),
        percent(row.agreement),
        f"{row.kl:.4f}",
        f"{100 * row.identical.value:.1f} %",
        f"{100 * row.shared_share:.0f} %",
        f"{100 * row.same_as_alone:.1f} %" if row.same_as_alone is not None else "",
        " / ".join(f"{max(row.errors[name]):.3f}" for name in ("k", "v", "hidden")) if row.errors else "",
    ]


def summary_cells(entry: Summary) -> list[str]:
    """The texts of ``SUMMARY_COLUMNS``."""
    return [
        f"{entry.policy}, converted" if entry.is_converted else entry.policy,
        f"{entry.num_adapters}",
        f"{entry.num_samples:,}",
        points(entry.loss),
        entry.worst,
        points(entry.worst_loss),
        f"{entry.num_level} of {entry.num_adapters}",
        f"{entry.num_shared} of {entry.num_adapters}",
        f"{100 * entry.shared_share:.0f} %",
    ]


def percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"


def points(loss: Interval) -> str:
    return f"{100 * loss.value:+.2f} ({100 * loss.low:.2f} to {100 * loss.high:.2f})"
