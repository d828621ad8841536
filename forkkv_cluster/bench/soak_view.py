"""A soak run on a terminal: one line while it runs, a table at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from forkkv_cluster.bench.soak_run import SoakRun


@contextmanager
def soak_progress(console: Console, minutes: float) -> Iterator[Callable[[SoakRun], None]]:
    """What a run calls after each check."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("soak: starting", total=minutes * 60)

        def on_settled(run: SoakRun) -> None:
            progress.update(task, completed=run.elapsed_s, description=_line(run))

        yield on_settled


def _line(run: SoakRun) -> str:
    counters, ends = run.driver.engine.status().counters, run.driver.ledger.ends
    rss = run.watch.readings[-1].rss_bytes / 2**20
    return (
        f"round {run.driver.num_rounds:,}: {ends['finished']:,} finished, {ends.total() - ends['finished']:,} not, "
        f"{counters.evictions:,} evictions, {counters.preemptions:,} preemptions, "
        f"{run.driver.replay.num_requests:,} outputs compared, {rss:,.0f} MiB"
    )


def soak_table(report: dict[str, Any]) -> Table:
    """The figures of a report, in the order in which one asks for them."""
    counters, process, outputs = report["counters"], report["process"], report["outputs"]
    table = Table("what", title=f"soak, seed {report['options']['seed']}", title_justify="left")
    table.add_column("count", justify="right")
    rows: dict[str, Any] = {
        "minutes": round(report["elapsed_s"] / 60, 1),
        "rounds": report["num_rounds"],
        "requests accepted": report["num_accepted"],
        **{f"requests {name}": count for name, count in report["ends"].items()},
        **{name: count for name, count in report["actions"].items() if name.startswith("refused")},
        "malformed requests refused": report["checks"].get("malformed requests", 0),
        "requests by an invoked aLoRA": report["num_invoked"],
        "prompt tokens scored": report["num_scored"],
        "output tokens": counters["output_tokens"],
        **{name: counters[name] for name in ("evictions", "preemptions")},
        "times all was checked": report["checks"].get("idle engine", 0),
        "outputs run again alone": outputs["requests"],
        "their tokens, and ties among them": f"{outputs['tokens']:,}, {outputs['ties']}",
        "prompt tokens scored again alone": outputs["prompt_tokens"],
        "growth after warm-up, MiB": round(process["rss_growth_bytes"] / 2**20, 1),
        "result": "passed" if report["passed"] else f"failed: {report['failed_check']}",
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    return table
