"""One number of a benchmark beside its target, as a value, a table row and JSON."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from forkkv_cluster.bench.environment import commit, host_info
from forkkv_cluster.core.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Measurement:
    """``value`` in ``unit``; ``at_most`` or ``at_least`` is the target, both None where there is none."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_met(self) -> bool | None:
        """None without a target."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (self.at_least is None or self.value >= self.at_least)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_met": self.is_met}


def median_us(run: Callable[[], object], repeats: int, reset: Callable[[], object] = lambda: None) -> float:
    """Median time of ``run`` in microseconds, after one run that does not count; ``reset`` follows each, untimed."""
    times = []
    for _ in range(repeats + 1):
        started_ns = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - started_ns)
        reset()
    return statistics.median(times[1:]) / 1000


def measurement_table(title: str, measurements: Sequence[Measurement]) -> Table:
    table = Table("what", title=title, title_justify="left")
    for column in ("measured", "target", "met"):
        table.add_column(column, justify="right")
    for entry in measurements:
        met = {True: "yes", False: "[bold red]no[/]", None: ""}[entry.is_met]
        table.add_row(entry.name, f"{entry.value:,.2f} {entry.unit}".strip(), _target(entry), met)
    return table


def _target(entry: Measurement) -> str:
    if entry.at_most is not None:
        return f"<= {entry.at_most:g} {entry.unit}".strip()
    return f">= {entry.at_least:g} {entry.unit}".strip() if entry.at_least is not None else ""


def check_can_write(option: str, path: Path | None) -> None:
    """Raises InvalidArgument that names ``option`` for a file that could not be written: before a run of minutes, not after."""
    if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        problem = "is a directory" if path.is_dir() else "cannot be written"
        raise InvalidArgument(option, str(path), problem, "Name a file in a directory that exists and is writable.")


def write_json(path: Path, measurements: Sequence[Measurement], **facts: Any) -> None:
    """The measurements with host and commit, without which no number means anything."""
    report = {"host": host_info(), "commit": commit(), **facts, "measurements": [m.to_json() for m in measurements]}
    path.write_text(json.dumps(report, indent=2) + "\n")
