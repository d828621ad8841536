"""``forkkv bench``: runs traces and reports them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from forkkv_cluster.bench.cache_bench import measure
from forkkv_cluster.bench.grpc_target import GrpcTarget
from forkkv_cluster.bench.measurement import check_can_write, measurement_table, write_json
from forkkv_cluster.bench.offline import OfflineTarget
from forkkv_cluster.bench.quality.cli import HELP as QUALITY_HELP
from forkkv_cluster.bench.quality.cli import quality
from forkkv_cluster.bench.report_table import report_tables
from forkkv_cluster.bench.runner import RunResult, run_trace
from forkkv_cluster.bench.soak_view import soak_progress, soak_table
from forkkv_cluster.bench.target import Target
from forkkv_cluster.bench.trace import Trace
from forkkv_cluster.bench.trace_file import load_trace
from forkkv_cluster.core.config import ClusterConfig, parse_bytes, parse_config
from forkkv_cluster.core.errors import ForkKVError, InvalidArgument
from forkkv_cluster.core.request import Sharing, WriterMode

app = typer.Typer(no_args_is_help=True, help="Run traces and report what they cost.")
app.command(help=QUALITY_HELP)(quality)
console = Console(stderr=True)


@app.callback()
def bench() -> None:
    """Run traces and report what they cost."""


@app.command()
def trace(
    trace_file: Annotated[Path, typer.Argument(metavar="TRACE", help="A forkkv-trace/1 file, see loadtests/README.md.")],
    target: Annotated[str, typer.Option(help="`offline` (an engine in this process) or `grpc://HOST:PORT`.")] = "offline",
    model: Annotated[str | None, typer.Option(help="Checkpoint directory; without it a small random one.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR of a PEFT adapter; repeatable. A cluster loads it if it lacks it.")
    ] = None,
    sharing: Annotated[Sharing, typer.Option(help="How branches share the context.")] = Sharing.EAGER,
    writer: Annotated[
        WriterMode | None, typer.Option(help="Who writes shared KV: the base model (canonical) or the first agent.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    kv_bytes: Annotated[str | None, typer.Option(help=r"KV memory, for example 1GiB. \[default: 256MiB]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampler; decoding is greedy.", min=0)] = 0,
    token: Annotated[str | None, typer.Option(help="Bearer token of a cluster that asks for one.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    outputs: Annotated[Path | None, typer.Option(help="Write each turn's token ids here, one JSON object a line.")] = None,
) -> None:
    """Run TRACE and report times, tokens, hits and memory.

    Against a cluster, --model, --dtype, --kv-bytes and --writer are the cluster's own and are refused.
    """
    try:
        check_can_write("--json", json_path)
        check_can_write("--outputs", outputs)
        parsed = load_trace(trace_file)
        engine_options = {"model": model, "dtype": dtype, "kv_bytes": kv_bytes, "writer": writer}
        adapters = parse_adapters(adapter or [])
        if target == "offline":
            with tempfile.TemporaryDirectory(prefix="forkkv-bench-") as directory:
                made = make_offline(engine_options, adapters, sharing, seed, Path(directory))
                result = _run(parsed, made, sharing, seed)
        else:
            result = _run(parsed, make_grpc(target, engine_options, adapters, sharing, seed, token), sharing, seed)
    except ForkKVError as error:
        _fail(error)
    _write(result, json_path, outputs)
    for table in report_tables(result.report):
        Console().print(table)


@app.command()
def cache(
    repeats: Annotated[int, typer.Option(help="Runs of each timing; the median counts.", min=1)] = 200,
    leaves: Annotated[int, typer.Option(help="Leaves of the large tree.", min=50)] = 50_000,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")] = None,
) -> None:
    """Time the tree, the allocator and the scheduler, and count the bytes that sharing costs. Needs no model."""
    try:
        check_can_write("--json", json_path)
    except ForkKVError as error:
        _fail(error)
    measurements = measure(repeats, leaves)
    if json_path is not None:
        write_json(json_path, measurements, repeats=repeats)
    Console().print(measurement_table("cache: medians", measurements))


@app.command()
def offline(
    repeats: Annotated[int, typer.Option(help="Runs of each workload after a warm-up; the median counts.", min=1)] = 3,
    kit: Annotated[Path, typer.Option(help="Directory of the random 82M-parameter model; written if missing.")] = Path(
        ".forkkv/speed-kit"
    ),
    peer_python: Annotated[Path | None, typer.Option(help="A Python that has vLLM: it runs the same workloads.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")] = None,
) -> None:
    """Run the speed workloads on an engine of this process, in bf16, and print ratios beside their targets.

    Takes minutes. Let nothing else run on the machine.
    """
    from forkkv_cluster.bench.offline_kit import run_offline  # Here: it needs torch, which the other verbs do without.

    try:
        check_can_write("--json", json_path)
        measurements = run_offline(kit, repeats, peer_python, lambda name: console.print(name, style="dim", highlight=False))
    except ForkKVError as error:
        _fail(error)
    except FileExistsError as error:
        _fail(InvalidArgument("--kit", str(kit), "is not the kit of this benchmark", str(error)))
    if json_path is not None:
        write_json(json_path, measurements, repeats=repeats)
    Console().print(measurement_table("offline: medians", measurements))


@app.command()
def adapters(
    registered: Annotated[int, typer.Option(help="Adapters that are registered.", min=64)] = 1000,
    slots: Annotated[int, typer.Option(help="Device slots.", min=1)] = 8,
    kit: Annotated[Path, typer.Option(help="Directory of the random model and its adapters; written if missing.")] = Path(
        ".forkkv/adapter-kit"
    ),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write rows and measurements here.")] = None,
) -> None:
    """Serve 1 to 64 active adapters of many registered ones over few device slots: waiting times, fairness, leaks."""
    from forkkv_cluster.bench.adapters_bench import rows_json, rows_table  # Here: these need an engine, other verbs do not.
    from forkkv_cluster.bench.adapters_kit import run_adapters

    active = (1, 4, 8, 16, 32, 64)
    try:
        check_can_write("--json", json_path)
        rows, measurements = run_adapters(
            kit, registered, active, slots, lambda name: console.print(name, style="dim", highlight=False)
        )
    except ForkKVError as error:
        _fail(error)
    if json_path is not None:
        write_json(json_path, measurements, registered=registered, rows=rows_json(rows))
    Console().print(rows_table(rows, registered))
    Console().print(measurement_table("adapters: checks", measurements))


def _fail(error: ForkKVError) -> NoReturn:
    console.print("[bold red]error[/] ", end="")
    console.print(error.message, markup=False, highlight=False)
    raise typer.Exit(2 if isinstance(error, InvalidArgument) else 1) from None


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(help="How long to go on; 0 for one round of checks.", min=0.0)] = 30.0,
    seed: Annotated[int, typer.Option(help="Of everything: the same seed repeats the same rounds.", min=0)] = 0,
    kv_bytes: Annotated[str, typer.Option(help="KV memory: little, so that everything is evicted all the time.")] = "448KiB",
    max_growth: Annotated[str, typer.Option(help="What the process may grow by after warm-up.")] = "48MiB",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Random agents, cancels, deadlines, reloads and bad requests on an engine of this process, checked all the time.

    Ends with code 1, the seed and the check that failed when something is wrong.
    """
    from forkkv_cluster.bench.soak_run import SoakOptions, make_run  # Here: they need torch.

    try:
        options = SoakOptions(
            seed, minutes, _parse_size("--kv-bytes", kv_bytes), max_growth_bytes=_parse_size("--max-growth", max_growth)
        )
        with tempfile.TemporaryDirectory(prefix="forkkv-soak-") as directory:
            run = make_run(options, Path(directory))
            with soak_progress(console, options.minutes) as on_settled:
                report = run.run(on_settled)
    except ForkKVError as error:
        _fail(error)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    Console().print(soak_table(report))
    if run.failure is not None:
        console.print(
            f"[bold red]failed[/] seed {seed}, round {run.driver.num_rounds}: {run.failure.message}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _parse_size(option: str, value: str) -> int:
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise InvalidArgument(option, value, str(error), "Write for example 448KiB.") from None


def parse_adapters(values: list[str]) -> dict[str, str]:
    """NAME=DIR arguments as a mapping. Raises InvalidArgument for another form, or a name given twice."""
    paths: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not (name and separator and path):
            raise InvalidArgument("--adapter", value, "is not NAME=DIR", "Write for example --adapter planner=./planner.")
        if name in paths:
            raise InvalidArgument("--adapter", value, "names an adapter twice", "Choose another name.")
        paths[name] = path
    return paths


def make_offline(
    options: dict[str, Any], adapters: dict[str, str], sharing: Sharing, seed: int, directory: Path
) -> OfflineTarget:
    """An engine on all cores of this machine; without a model, on a small random one, built into ``directory``."""
    from forkkv_cluster.engine.engine import Engine  # Here: a run against a cluster needs no torch.

    config = offline_config(options, adapters, directory)
    return OfflineTarget(
        Engine.from_config(config),
        block_size=config.cache.page_size,
        sharing=sharing,
        writer=options["writer"] or WriterMode.CANONICAL,
        seed=seed,
    )


def offline_config(options: dict[str, Any], adapters: dict[str, str], directory: Path) -> ClusterConfig:
    """The options as a configuration. Raises InvalidArgument that names the bad field."""
    path, name = options["model"], ""
    if path is None:
        from forkkv_cluster.testing.tiny_models import build_tiny_kit

        kit = build_tiny_kit(directory / "tiny-kit")
        path, name = str(kit.model_dir), kit.model_dir.name
        adapters = {name: str(path) for name, path in kit.adapter_dirs.items()} | adapters
    return parse_config(
        {
            "model": {"path": path, "name": name or Path(path).name, "dtype": options["dtype"] or "auto"},
            "adapters": [{"name": name, "path": adapter_dir} for name, adapter_dir in adapters.items()],
            "cache": {"kv_bytes": options["kv_bytes"]} if options["kv_bytes"] is not None else {},
            "worker": {"num_threads": os.cpu_count() or 1},
            "defaults": {"adapter_sharing": "isolated"},  # nothing is measured beside what is timed
        }
    )


def make_grpc(
    target: str, options: dict[str, Any], adapters: dict[str, str], sharing: Sharing, seed: int, token: str | None
) -> GrpcTarget:
    """Raises InvalidArgument for another scheme, and for options that are the cluster's own."""
    scheme, _, address = target.partition("://")
    if scheme != "grpc" or ":" not in address:
        raise InvalidArgument("--target", target, "is not offline or grpc://HOST:PORT", "Name one of them.")
    for name, value in options.items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            raise InvalidArgument(option, str(value), "is the cluster's own", "Leave it out, or use --target offline.")
    made = GrpcTarget(address, sharing=sharing, seed=seed, token=token)
    made.load_adapters(adapters)
    return made


def _run(parsed: Trace, target: Target, sharing: Sharing, seed: int) -> RunResult:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{parsed.name}, {sharing}", total=len(parsed.events))

        def on_progress(num_ended: int) -> None:
            progress.update(task, completed=num_ended)

        return run_trace(parsed, target, sharing=sharing, seed=seed, on_progress=on_progress)


def _write(result: RunResult, json_path: Path | None, outputs: Path | None) -> None:
    if json_path is not None:
        json_path.write_text(json.dumps(result.report, indent=2) + "\n")
    if outputs is not None:
        outputs.write_text("".join(json.dumps(line) + "\n" for line in result.outputs()))
