"""``forkkv bench quality``: the command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from forkkv_cluster.bench.environment import commit, host_info
from forkkv_cluster.bench.measurement import check_can_write
from forkkv_cluster.bench.quality.policies import Policy
from forkkv_cluster.core.errors import ForkKVError, InvalidArgument
from forkkv_cluster.core.request import WriterMode

__all__ = ["HELP", "quality"]

CASEBOOK = "casebook"
_ADAPTER_HELP = "NAME=DIR of a PEFT adapter; repeatable. Each is measured; several are needed for orders of arrival."
_SAMPLES_HELP = "A JSON lines file, see below, or `casebook`: generated ones."
_ARRIVALS_HELP = "Orders of arrival: 1, the adapter comes first; each further one, another adapter before it."
HELP = (
    "Measure what sharing a context costs each adapter: right answers, tokens, KV.\n\n"
    "Every sample is answered under each policy on an engine of this process and compared with `isolated`, which is exact: "
    "accuracy and F1 with intervals of 95 %, the paired loss, agreement and KL along isolated's own answer, relative errors "
    "of K, V and hidden states by layer. `dropped` is the known bad case, in which the residual of the shared context is "
    "ignored; `unadapted` is the base model alone.\n\n"
    'A line of --samples: {"context": ..., "question": ..., "answer": ...}, and if wanted "adapter" (else all answer it), '
    '"role" (scored as that casebook role) and "context_tokens" (the length it is listed under). The question is tokenised '
    "as it stands, with whatever layout the adapter expects.\n\n"
    "Example: forkkv bench quality ./model --adapter mapper=./mapper --adapter hop=./hop --html quality.html"
)
console = Console(stderr=True)


def quality(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Checkpoint directory with its tokenizer.")],
    adapter: Annotated[list[str], typer.Option(help=_ADAPTER_HELP)],
    samples: Annotated[str, typer.Option(help=_SAMPLES_HELP)] = CASEBOOK,
    role: Annotated[list[str] | None, typer.Option(help="NAME=ROLE: a casebook role, if the name tells none.")] = None,
    policy: Annotated[list[Policy] | None, typer.Option(help="What is compared; repeatable. Default: all.")] = None,
    writer: Annotated[list[WriterMode] | None, typer.Option(help="Who writes shared KV; repeatable. Default: both.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a casebook; repeatable. Default: 256, 512.")] = None,
    count: Annotated[int, typer.Option(help="Casebook samples of each adapter and length.", min=1)] = 50,
    arrivals: Annotated[int, typer.Option(help=_ARRIVALS_HELP, min=1)] = 2,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 64,
    top: Annotated[int, typer.Option(help="Most likely tokens that KL is over.", min=1, max=20)] = 20,
    probes: Annotated[int, typer.Option(help="Samples of each adapter whose K, V and hidden states are read.", min=0)] = 2,
    batch: Annotated[int, typer.Option(help="Samples that run at once.", min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    kv_bytes: Annotated[str, typer.Option(help="KV memory.")] = "256MiB",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all cores.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of casebooks and resamples.", min=0)] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write the report here, with charts, as one page.")] = None,
) -> None:
    """Measure, write the reports, print the tables. Ends with code 2 for an argument that cannot be, 1 for other errors."""
    from forkkv_cluster.bench.quality.table import quality_tables

    try:
        check_can_write("--json", json_path)
        check_can_write("--html", html_path)
        adapters = named(adapter, "--adapter", "DIR")
        found, options, facts = _measure(
            model_dir, adapters, samples, named(role or [], "--role", "ROLE"), tuple(length or (256, 512)), count,
            {"policies": tuple(policy or Policy), "writers": tuple(writer or WriterMode), "num_arrivals": arrivals,
             "max_tokens": max_tokens, "num_top": top, "num_probes": probes, "batch_size": batch, "seed": seed},
            {"dtype": dtype, "kv_bytes": kv_bytes, "num_threads": threads or os.cpu_count() or 1},
        )  # fmt: skip
    except ForkKVError as error:
        console.print("[bold red]error[/] ", end="")
        console.print(error.message, markup=False, highlight=False)
        raise typer.Exit(2 if isinstance(error, InvalidArgument) else 1) from None
    report = {
        "format": "forkkv-quality/1", "host": host_info(), "commit": commit(), **facts, "options": options,
        "rows": [row.to_json() for row in found],
    }  # fmt: skip
    _write(report, found, json_path, html_path)
    for table in quality_tables(found):
        Console().print(table)


def named(values: Sequence[str], option: str, what: str) -> dict[str, str]:
    """NAME=VALUE arguments as a mapping. Raises InvalidArgument for another form, or a name given twice."""
    found: dict[str, str] = {}
    for value in values:
        name, _, rest = value.partition("=")
        if not (name and rest):
            raise InvalidArgument(option, value, f"is not NAME={what}", f"Write for example {option} planner={what.lower()}.")
        if name in found:
            raise InvalidArgument(option, value, "names an adapter twice", "Choose another name.")
        found[name] = rest
    return found


def _measure(
    model_dir: Path, adapters: dict[str, str], source: str, roles: dict[str, str], lengths: tuple[int, ...], count: int,
    options: dict[str, Any], engine_options: dict[str, Any],
) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Rows; the options as JSON; model, dtype and samples."""
    from forkkv_cluster.bench.quality.casebook import casebook_samples, roles_of  # Here: what follows needs torch.
    from forkkv_cluster.bench.quality.engine import QualityEngine, engine_config
    from forkkv_cluster.bench.quality.run import QualityOptions, run_quality
    from forkkv_cluster.bench.quality.samples import read_samples

    if source == CASEBOOK:
        found = casebook_samples(roles_of(adapters, roles), lengths, count, options["seed"])
    else:
        found = read_samples(Path(source), adapters)
    engine = QualityEngine(engine_config(model_dir, adapters, **engine_options))
    chosen = QualityOptions(**options)
    with _progress() as on_progress:
        rows = run_quality(engine, found, chosen, on_progress)
    facts = {"model": model_dir.name, "dtype": engine.engine.model_info.dtype, "samples": source, "num_samples": len(found)}
    return rows, asdict(chosen), facts


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _write(report: dict[str, Any], rows: Sequence[Any], json_path: Path | None, html_path: Path | None) -> None:
    from forkkv_cluster.bench.quality.page import quality_page

    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    if html_path is not None:
        html_path.write_text(quality_page(report, rows))
