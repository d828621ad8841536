"""``forkkv bench quality``: the command."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from forkkv_cluster.bench.environment import commit, host_info
from forkkv_cluster.bench.measurement import check_can_write
from forkkv_cluster.bench.quality.policies import Policy
from forkkv_cluster.core.errors import ForkKVError, InvalidArgument
from forkkv_cluster.core.request import WriterMode
from forkkv_cluster.core.verdict import SharingVerdict

if TYPE_CHECKING:
    from forkkv_cluster.bench.quality.run import QualityResult

__all__ = ["HELP", "quality"]

CASEBOOK = "casebook"
_ADAPTER_HELP = "NAME=DIR of a PEFT adapter; repeatable. Each is measured; several are needed for orders of arrival."
_SAMPLES_HELP = "A JSON lines file, see below, or `casebook`: generated ones."
_LENGTH_HELP = "Tokens of a casebook, or TOKENS:COUNT; repeatable. Default: 256, 512."
_MINUTES_HELP = "Begin nothing after so long, and report what has run: of all adapters and lengths alike."
_REFERENCE_HELP = "NAME=OTHER: NAME was made from OTHER, whose isolated answers it is held against; repeatable."
_ARRIVALS_HELP = "Orders of arrival: 1, the adapter comes first; each further one, another adapter before it."
HELP = (
    "Measure what sharing a context costs each adapter: right answers, tokens, KV.\n\n"
    "Every sample is answered under each policy on an engine of this process and compared with `isolated`, which is exact: "
    "accuracy and F1 with intervals of 95 %, the paired loss, agreement and KL along isolated's own answer, relative errors "
    "of K, V and hidden states by layer. `auto` is what calibrating the adapter says at the default bound; `dropped` is the "
    "known bad case, in which the residual of the shared context is ignored; `unadapted` is the base model alone.\n\n"
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
    reference: Annotated[list[str] | None, typer.Option(help=_REFERENCE_HELP)] = None,
    length: Annotated[list[str] | None, typer.Option(help=_LENGTH_HELP)] = None,
    count: Annotated[int, typer.Option(help="Casebook samples of each adapter and length that names no count.", min=1)] = 50,
    arrivals: Annotated[int, typer.Option(help=_ARRIVALS_HELP, min=1)] = 2,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 64,
    top: Annotated[int, typer.Option(help="Most likely tokens that KL is over.", min=1, max=20)] = 20,
    probes: Annotated[int, typer.Option(help="Samples of each adapter whose K, V and hidden states are read.", min=0)] = 2,
    batch: Annotated[int, typer.Option(help="Samples that run at once.", min=1)] = 16,
    calibration_samples: Annotated[Path | None, typer.Option(help="Sample contexts of `auto`, as the server's.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    kv_bytes: Annotated[str, typer.Option(help="KV memory of each engine.")] = "256MiB",
    workers: Annotated[int, typer.Option(help="Processes, each with an engine of its own.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of each; 0: all cores between them.", min=0)] = 0,
    minutes: Annotated[float, typer.Option(help=_MINUTES_HELP, min=0)] = math.inf,
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
        roles, references = named(role or [], "--role", "ROLE"), named(reference or [], "--reference", "OTHER")
        check_references(references, adapters)
        result, facts = _measure(
            model_dir, adapters, samples, roles, length or ["256", "512"], count, workers, 60 * minutes,
            {"policies": tuple(policy or Policy), "writers": tuple(writer or WriterMode), "num_arrivals": arrivals,
             "max_tokens": max_tokens, "num_top": top, "num_probes": probes, "batch_size": batch, "seed": seed,
             "references": references},
            {"calibration": {"samples": str(calibration_samples or "")}, "dtype": dtype, "kv_bytes": kv_bytes,
             "num_threads": threads or max(1, (os.cpu_count() or 1) // workers)},
        )  # fmt: skip
    except ForkKVError as error:
        console.print("[bold red]error[/] ", end="")
        console.print(error.message, markup=False, highlight=False)
        raise typer.Exit(2 if isinstance(error, InvalidArgument) else 1) from None
    report = {"format": "forkkv-quality/2", "host": host_info(), "commit": commit(), **facts}
    _write(report, result, json_path, html_path)
    for table in quality_tables(result.rows):
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


def check_references(references: Mapping[str, str], adapters: Mapping[str, str]) -> None:
    """Raises InvalidArgument for a name that is no adapter's, or one that is held against something held elsewhere."""
    for pair in references.items():
        for name in pair:
            if name not in adapters:
                raise InvalidArgument("--reference", "=".join(pair), f"names no adapter {name!r}", "Add it by --adapter.")
        if pair[1] in references:
            raise InvalidArgument(
                "--reference", "=".join(pair), f"{pair[1]} is itself held against {references[pair[1]]}", "Name that one."
            )


def _measure(
    model_dir: Path, adapters: dict[str, str], source: str, roles: dict[str, str], lengths: list[str], count: int,
    num_workers: int, max_seconds: float, options: dict[str, Any], engine_options: dict[str, Any],
) -> tuple[QualityResult, dict[str, Any]]:  # fmt: skip
    """The result; model, dtype, samples and options as JSON."""
    from forkkv_cluster.bench.quality.casebook import casebook_samples, lengths_of, roles_of  # Here: what follows needs torch.
    from forkkv_cluster.bench.quality.engine import QualityEngine, engine_config
    from forkkv_cluster.bench.quality.pool import Local, Processes
    from forkkv_cluster.bench.quality.run import QualityOptions, run_quality
    from forkkv_cluster.bench.quality.samples import read_samples

    if source == CASEBOOK:
        found = casebook_samples(roles_of(adapters, roles), lengths_of(lengths, count), options["seed"])
    else:
        found = read_samples(Path(source), adapters)
    config = engine_config(model_dir, adapters, **engine_options)
    engine, chosen = QualityEngine(config), QualityOptions(**options)
    workers = Processes(config, num_workers) if num_workers > 1 else nullcontext(Local(engine))
    with workers as pool, _progress() as on_progress:
        result = run_quality(engine.subjects, pool, found, chosen, on_progress, max_seconds)
    facts = {"model": model_dir.name, "dtype": engine.engine.model_info.dtype, "samples": source, "num_samples": len(found)}
    return result, {**facts, "options": asdict(chosen)}


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _write(report: dict[str, Any], result: QualityResult, json_path: Path | None, html_path: Path | None) -> None:
    from forkkv_cluster.bench.quality.page import quality_page
    from forkkv_cluster.bench.quality.summary import summaries

    if json_path is not None:
        found = {
            "summaries": [entry.to_json() for entry in summaries(result.rows)],
            "verdicts": {name: verdict_json(verdict) for name, verdict in result.verdicts.items()},
            "rows": [row.to_json() for row in result.rows],
        }
        json_path.write_text(json.dumps({**report, **found}, indent=2) + "\n")
    if html_path is not None:
        html_path.write_text(quality_page(report, result.rows, result.verdicts))


def verdict_json(verdict: SharingVerdict) -> dict[str, Any]:
    """With the bound on each sharing's disagreement that was held against the operator's."""
    measured = {
        str(entry.sharing): {**asdict(entry.agreement), "upper_bound": entry.agreement.upper_bound}
        for entry in verdict.measured
    }
    facts = {key: str(value) for key, value in asdict(verdict).items() if key in ("sharing", "state", "reason", "samples")}
    return {**facts, "max_disagreement": verdict.max_disagreement, "measured": measured}
