"""What the commands of training share: errors without a traceback, and a bar for what is being done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from forkkv_cluster.core.errors import ForkKVError, InvalidArgument

OnProgress = Callable[[str, int, int, str], None]
"""(what is being done, units done, units in all, a word on it)."""

console = Console(stderr=True)


@contextmanager
def errors_for_people() -> Iterator[None]:
    try:
        yield
    except ForkKVError as error:
        console.print(f"[bold red]error[/] {error.code}: ", end="")
        console.print(error.message, markup=False, highlight=False)
        raise typer.Exit(2 if isinstance(error, InvalidArgument) else 1) from None


@contextmanager
def progress() -> Iterator[OnProgress]:
    """One bar on standard error for what is being done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int, note: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, note=note)
            bars.update(tasks[what], completed=done, total=total, note=note)

        yield show
