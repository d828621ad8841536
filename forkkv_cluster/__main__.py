"""The ``forkkv`` command. ``serve`` starts a cluster; every other command talks to one, or to none."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel

from forkkv_cluster.bench.cli import app as bench_app
from forkkv_cluster.bench.demo import StartedCluster, make_demo
from forkkv_cluster.cli.adapters import load_adapter
from forkkv_cluster.cli.common import errors_for_people
from forkkv_cluster.cli.config import config as config_command
from forkkv_cluster.cli.generate import generate
from forkkv_cluster.cli.plan import HELP as PLAN_HELP
from forkkv_cluster.cli.plan import plan
from forkkv_cluster.cli.status import status
from forkkv_cluster.core.config import ClusterConfig, load_config, parse_config
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.cli import train_adapter
from forkkv_cluster.training.repair_cli import measure_repair

cli = typer.Typer(
    name="forkkv",
    help="Serve many LoRA agents over one shared context: base KV once, a low-rank residual per agent.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
cli.command()(status)
cli.command()(generate)
cli.command("load-adapter")(load_adapter)
cli.command("config")(config_command)
cli.command(help=PLAN_HELP)(plan)
cli.command("train-adapter")(train_adapter)
cli.command("measure-repair")(measure_repair)
cli.add_typer(bench_app, name="bench")


def _start_cluster(config: ClusterConfig) -> StartedCluster:
    from forkkv_cluster.app import start_cluster  # Here: Ray takes seconds that `forkkv --help` need not wait for.

    return start_cluster(config)


cli.command("demo")(make_demo(_start_cluster))


@cli.command()
def serve(
    model: Annotated[
        Path | None, typer.Argument(help="Hugging Face checkpoint directory. Left out: the embedded casebook model.")
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=DIR of a PEFT adapter; repeat for more.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration file; `forkkv config` prints one to start from.")] = None,
    host: Annotated[str | None, typer.Option(help=r"Address to listen on. \[default: 127.0.0.1]")] = None,
    http_port: Annotated[
        int | None, typer.Option(help=r"OpenAI-compatible HTTP; 0 takes a free port. \[default: 8000]")
    ] = None,
    grpc_port: Annotated[int | None, typer.Option(help=r"gRPC; 0 takes a free port. \[default: 9000]")] = None,
    workers: Annotated[int | None, typer.Option(help=r"Number of workers. \[default: 2]")] = None,
    device: Annotated[str | None, typer.Option(help=r"auto, cpu or cuda. \[default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help=r"auto, float32, bfloat16 or float16. \[default: auto]")] = None,
    kv_bytes: Annotated[str | None, typer.Option(help="KV memory of each worker, for example 512MiB.")] = None,
    sharing: Annotated[Sharing | None, typer.Option(help=r"Sharing of sessions that name none. \[default: auto]")] = None,
    adapter_sharing: Annotated[
        Sharing | None,
        typer.Option(help=r"What auto comes to on adapters that name none; auto: they are measured. \[default: auto]"),
    ] = None,
    session_store: Annotated[str | None, typer.Option(help="memory:, sqlite:PATH or redis://HOST:PORT/DB.")] = None,
) -> None:
    """Start a cluster on this host and serve until Ctrl-C.

    Examples: [bold]forkkv serve[/] for the embedded model; [bold]forkkv serve ./llama --adapter planner=./planner[/];
    [bold]forkkv serve --config cluster.yaml --http-port 8080[/]. Options win over the file.
    """
    with errors_for_people():
        overrides: dict[str, dict[str, Any]] = {
            "model": {"path": str(model) if model else None, "device": device, "dtype": dtype},
            "cache": {"kv_bytes": kv_bytes},
            "server": {"host": host, "http_port": http_port, "grpc_port": grpc_port},
            "worker": {"num_replicas": workers},
            "gateway": {"session_store": session_store},
            "defaults": {"session_sharing": sharing, "adapter_sharing": adapter_sharing},
        }
        run_until_stopped(merged_config(load_config(config) if config else ClusterConfig(), overrides, adapter or []))


def merged_config(base: ClusterConfig, overrides: dict[str, dict[str, Any]], adapters: list[str]) -> ClusterConfig:
    """``base`` with what the command line names. Raises InvalidArgument as for a file."""
    raw = base.model_dump(mode="json")
    for section, values in overrides.items():
        raw[section].update({name: value for name, value in values.items() if value is not None})
    named = dict(parse_adapter(text) for text in adapters)
    kept = [adapter for adapter in raw["adapters"] if adapter["name"] not in named]
    raw["adapters"] = [*kept, *({"name": name, "path": path} for name, path in named.items())]
    return parse_config(raw)


def parse_adapter(text: str) -> tuple[str, str]:
    """``NAME=DIR`` -> (NAME, DIR)."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise InvalidArgument("--adapter", text, "is not NAME=DIR", "Write, for example, --adapter planner=./adapters/planner.")
    return name, path


def run_until_stopped(config: ClusterConfig) -> None:
    """Start, print where it listens, wait for SIGINT or SIGTERM, stop."""
    from forkkv_cluster.app import start_cluster  # Here: Ray takes seconds that `forkkv --help` need not wait for.

    console = Console()
    with console.status("starting Ray, Serve and the workers ..."):
        cluster = start_cluster(config)
    # After the start, because Ray sets handlers of its own; theirs would end the process without stopping the cluster.
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        console.print(banner(cluster.config, cluster.http_url, cluster.grpc_address))
        stopped.wait()
    finally:
        with console.status("stopping ..."):
            cluster.stop()


def banner(config: ClusterConfig, http_url: str, grpc_address: str) -> Panel:
    """Where the cluster listens, and a first thing to try."""
    names = ", ".join(adapter.name for adapter in config.adapters) or "none"
    lines = [
        f"model     [bold]{config.model.name}[/]  adapters: {names}",
        f"HTTP      [bold]{http_url}/v1[/]  (OpenAI-compatible)",
        f"gRPC      [bold]{grpc_address}[/]  (forkkv_cluster.api.v1)",
        f"sessions  {config.gateway.session_store}",
        "",
        f"try       forkkv generate 'Hello' --address {grpc_address}",
        f"          forkkv status --address {grpc_address}",
    ]
    return Panel("\n".join(lines), title="ForkKV Cluster is ready", subtitle="Ctrl-C stops it", expand=False)


def main() -> None:
    cli()


if __name__ == "__main__":
    main()
