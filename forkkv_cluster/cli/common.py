"""What the commands share: the address option, errors without a traceback, and sizes for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from forkkv_cluster.core.errors import ForkKVError

Address = Annotated[
    str, typer.Option("--address", "-a", help="HOST:PORT of the cluster's gRPC proxy.", envvar="FORKKV_ADDRESS")
]
Token = Annotated[str | None, typer.Option(help="Bearer token, where the server needs one.", envvar="FORKKV_TOKEN")]
DEFAULT_ADDRESS = "127.0.0.1:9000"

_EXIT_CODES = {"INVALID_ARGUMENT": 2, "UNIMPLEMENTED": 2}


def fail(error: ForkKVError) -> NoReturn:
    """Print the error and leave: 2 for a user's mistake, 1 for everything else."""
    Console(stderr=True).print(f"[bold red]error[/] {error.code}: ", end="")
    Console(stderr=True).print(error.message, markup=False, highlight=False)
    raise typer.Exit(_EXIT_CODES.get(error.code, 1))


@contextmanager
def errors_for_people() -> Iterator[None]:
    try:
        yield
    except ForkKVError as error:
        fail(error)


def size(num_bytes: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise ValueError(num_bytes)
