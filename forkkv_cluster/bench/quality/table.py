"""Rows as a table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from forkkv_cluster.bench.quality.comparison import Row
from forkkv_cluster.bench.quality.stats import Interval

__all__ = ["COLUMNS", "cells_of", "quality_tables"]

COLUMNS = (
    "policy", "first", "context", "n", "accuracy", "loss, points", "F1", "agreement", "KL", "identical", "as alone",
    "K / V / hidden",
)  # fmt: skip
"""Of one row; the adapter heads its table."""


def quality_tables(rows: Sequence[Row]) -> list[Table]:
    """One for each adapter, of the rows over all lengths: the reports have the others."""
    by_adapter: dict[str, list[Row]] = {}
    for row in rows:
        by_adapter.setdefault(row.adapter, []).append(row)
    return [
        _table(name, [row for row in own if row.context_tokens == own[0].context_tokens]) for name, own in by_adapter.items()
    ]


def _table(name: str, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{name} (rank {rows[0].lora_rank})", title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=index < 2)
    for row in rows:
        table.add_row(*cells_of(row))
    return table


def cells_of(row: Row) -> list[str]:
    """The texts of ``COLUMNS``."""
    policy = row.policy if row.writer == "canonical" else f"{row.policy}, first writes"
    return [
        policy,
        "itself" if row.is_first else row.first,
        f"{row.context_tokens:,}" if row.context_tokens else "all",
        f"{row.num_samples:,}",
        percent(row.accuracy),
        points(row.accuracy_loss) if row.policy != "isolated" else "",
        percent(row.f1),
        percent(row.agreement),
        f"{row.kl:.4f}",
        f"{100 * row.identical.value:.1f} %",
        f"{100 * row.same_as_alone:.1f} %" if row.same_as_alone is not None else "",
        " / ".join(f"{max(row.errors[name]):.3f}" for name in ("k", "v", "hidden")) if row.errors else "",
    ]


def percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"


def points(loss: Interval) -> str:
    return f"{100 * loss.value:+.1f} ({100 * loss.low:+.1f} to {100 * loss.high:+.1f})"
