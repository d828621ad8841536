"""The report as one HTML file that needs nothing else. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from forkkv_cluster.bench.quality.chart import interval_chart, line_chart
from forkkv_cluster.bench.quality.comparison import Row
from forkkv_cluster.bench.quality.summary import summaries, whole
from forkkv_cluster.bench.quality.table import (
    COLUMNS,
    SUMMARY_COLUMNS,
    cells_of,
    points,
    policy_name,
    summary_cells,
    title_of,
)
from forkkv_cluster.core.verdict import SharingVerdict

__all__ = ["quality_page"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
svg { width: 100%; max-width: 640px; font: 12px system-ui, sans-serif; fill: currentColor; margin: 0.7rem 1rem 0.7rem 0; }
dt { font-weight: 600; } dd { margin: 0 0 0.5rem 1rem; }
"""
_TERMS = {
    "policy": "isolated: KV of its own, exact. residual, eager: base KV shared, a residual for the adapter from its own pass "
    "or from the base model's. dropped: base KV without the residual, own tokens adapted; the known bad case. base: the same "
    "of an aLoRA, for which it is exact. unadapted: no adapter. 'first writes': the first branch's pass wrote the context, not "
    "the base model's. auto: as the calibration says that is named behind it.",
    "first": "whose branch came first over the context",
    "accuracy, F1": "of free-running greedy answers; intervals of 95 %, Wilson's and by bootstrap",
    "loss": "accuracy of isolated less this, in points, on the same samples; Newcombe's paired interval of 95 %. Of a "
    "converted adapter isolated is that of the adapter it was made from",
    "shared": "mean share of a context's tokens that the branch found in the cache, base and residual, and did not run for "
    "itself. A context is found in whole pages",
    "within zero": "adapters whose own interval of the loss has zero in it, or lies below",
    "agreement": "share of positions of isolated's answer, teacher-forced, at which the most likely token is the same. Of "
    "isolated itself: the same, run one by one, which is the noise of batch shapes",
    "KL": "KL(isolated | this), nats a position, over the most likely tokens of both, that of the answer, and all others "
    "as one: a lower bound",
    "identical": "share of free-running answers that are isolated's, token for token",
    "as alone": "share of answers that stay the same, token for token, where another adapter came first",
    "K / V / hidden": "largest relative error of any layer against isolated: K and V of the shared context as the branch reads "
    "them, hidden states of its own tokens",
}


def quality_page(report: Mapping[str, Any], rows: Sequence[Row], verdicts: Mapping[str, SharingVerdict]) -> str:
    """``report``: the facts of the run, as the JSON has them; ``rows`` of at least one adapter; how ``auto`` serves which."""
    facts = {"model": report["model"], "samples": report["samples"], **report["options"], "commit": report["commit"]}
    parts = [
        "<h1>What sharing costs in quality</h1>",
        _definitions({key: _shown(value) for key, value in facts.items()}, "How it was measured"),
        _overview(rows),
        _definitions({name: f"{v.sharing}: {v.reason}" for name, v in verdicts.items()}, "What auto chose, and why")
        if verdicts
        else "",
    ]
    for name in dict.fromkeys(row.adapter for row in rows):
        parts.append(_adapter([row for row in rows if row.adapter == name]))
    parts.append(_definitions(_TERMS, "Words"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Quality of shared context</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {other}" for key, other in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _definitions(entries: Mapping[str, str], title: str) -> str:
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries.items())
    return f"<details><summary>{escape(title)}</summary><dl>{items}</dl></details>"


def _overview(rows: Sequence[Row]) -> str:
    """All adapters beside one another: accuracy and loss of each policy, in all, and as charts."""
    plain = [row for row in whole(rows) if row.is_first and row.writer == "canonical"]
    policies = list(dict.fromkeys(row.policy for row in plain))
    by_place = {(row.adapter, row.policy): row for row in plain}
    body = [
        [name, *(_brief(by_place.get((name, policy))) for policy in policies)]
        for name in dict.fromkeys(row.adapter for row in plain)
    ]
    others = [policy for policy in policies if any(not row.is_reference for row in plain if row.policy == policy)]
    charts = [
        interval_chart(
            f"Loss under {policy} against isolated",
            [(_served_name(row), row.accuracy_loss) for row in plain if row.policy == policy and not row.is_reference],
            unit="points",
            decimals=2,
        )
        for policy in others
    ]
    totals = _table(SUMMARY_COLUMNS, [summary_cells(entry) for entry in summaries(rows)])
    title, note = "<h2>All adapters</h2>", "<p>Right answers in %, and what is lost against isolated, in points.</p>"
    return f"<section>{title}{note}{_table(('adapter', *policies), body)}{totals}{''.join(charts)}</section>"


def _brief(row: Row | None) -> str:
    if row is None:
        return ""
    served = f" as {row.served}" if row.served else ""
    accuracy = f"{100 * row.accuracy.value:.1f}{served}"
    return accuracy if row.is_reference else f"{accuracy}, loss {points(row.accuracy_loss)}"


def _served_name(row: Row) -> str:
    return f"{row.adapter} ({row.served})" if row.served else row.adapter


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _adapter(rows: Sequence[Row]) -> str:
    top = whole(rows)
    charts = [
        interval_chart("Accuracy", [(label_of(row), row.accuracy) for row in top]),
        interval_chart("Loss against isolated", [(label_of(row), row.accuracy_loss) for row in top], unit="points", decimals=2),
        interval_chart("Teacher-forced agreement with isolated", [(label_of(row), row.agreement) for row in top]),
        *_error_charts([row for row in top if row.errors and not row.is_reference]),
    ]
    table = _table(COLUMNS, [cells_of(row) for row in rows])
    return f"<section><h2>{escape(title_of(rows[0]))}</h2>{table}{''.join(charts)}</section>"


def _error_charts(rows: Sequence[Row]) -> list[str]:
    titles = {"k": "Relative error of K", "v": "Relative error of V", "hidden": "Relative error of hidden states"}
    if not rows:
        return []
    return [line_chart(title, {label_of(row): row.errors[name] for row in rows}, "layer") for name, title in titles.items()]


def label_of(row: Row) -> str:
    """A row's name in a chart."""
    return policy_name(row) + ("" if row.is_first else f", after {row.first}")
