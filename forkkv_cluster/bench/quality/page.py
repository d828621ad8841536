"""The report as one HTML file that needs nothing else. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from forkkv_cluster.bench.quality.chart import interval_chart, line_chart
from forkkv_cluster.bench.quality.comparison import Row
from forkkv_cluster.bench.quality.table import COLUMNS, cells_of

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
    "the base model's.",
    "first": "whose branch came first over the context",
    "accuracy, F1": "of free-running greedy answers; intervals of 95 %, Wilson's and by bootstrap",
    "loss": "accuracy of isolated less this, in points, on the same samples; Newcombe's paired interval of 95 %",
    "agreement": "share of positions of isolated's answer, teacher-forced, at which the most likely token is the same. Of "
    "isolated itself: the same, run one by one, which is the noise of batch shapes",
    "KL": "KL(isolated | this), nats a position, over the most likely tokens of both, that of the answer, and all others "
    "as one: a lower bound",
    "identical": "share of free-running answers that are isolated's, token for token",
    "as alone": "share of answers that stay the same, token for token, where another adapter came first",
    "K / V / hidden": "largest relative error of any layer against isolated: K and V of the shared context as the branch reads "
    "them, hidden states of its own tokens",
}


def quality_page(report: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """``report``: the facts of the run, as the JSON has them; ``rows`` of at least one adapter."""
    facts = {"model": report["model"], "samples": report["samples"], **report["options"], "commit": report["commit"]}
    parts = [
        "<h1>What sharing costs in quality</h1>",
        _definitions({k: str(v) for k, v in facts.items()}, "How it was measured"),
    ]
    for name in dict.fromkeys(row.adapter for row in rows):
        parts.append(_adapter(name, [row for row in rows if row.adapter == name]))
    parts.append(_definitions(_TERMS, "Words"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Quality of shared context</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _definitions(entries: Mapping[str, str], title: str) -> str:
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries.items())
    return f"<details><summary>{escape(title)}</summary><dl>{items}</dl></details>"


def _adapter(name: str, rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in cells_of(row)) + "</tr>" for row in rows)
    whole = [row for row in rows if row.context_tokens == rows[0].context_tokens]  # each policy's first row
    charts = [
        interval_chart("Accuracy", [(label_of(row), row.accuracy) for row in whole]),
        interval_chart("Loss against isolated", [(label_of(row), row.accuracy_loss) for row in whole], unit="points"),
        interval_chart("Teacher-forced agreement with isolated", [(label_of(row), row.agreement) for row in whole]),
        *_error_charts([row for row in whole if row.errors and row.policy != "isolated"]),
    ]
    title = f"<h2>{escape(name)} (rank {rows[0].lora_rank})</h2>"
    return f"<section>{title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{''.join(charts)}</section>"


def _error_charts(rows: Sequence[Row]) -> list[str]:
    titles = {"k": "Relative error of K", "v": "Relative error of V", "hidden": "Relative error of hidden states"}
    if not rows:
        return []
    return [line_chart(title, {label_of(row): row.errors[name] for row in rows}, "layer") for name, title in titles.items()]


def label_of(row: Row) -> str:
    """A row's name in a chart."""
    writer = "" if row.writer == "canonical" else ", first writes"
    return f"{row.policy}{writer}" + ("" if row.is_first else f", after {row.first}")
