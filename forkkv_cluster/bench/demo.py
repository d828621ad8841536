"""``forkkv demo``: a cluster, eight agents over one document, with and without sharing, and what the fork saved."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn, Protocol

import typer
from rich.console import Console

from forkkv_cluster.bench.demo_casebook import casebook_plan
from forkkv_cluster.bench.demo_checks import Check, check_kill, check_policies, savings, to_json
from forkkv_cluster.bench.demo_plan import DemoPlan, PolicyResult
from forkkv_cluster.bench.demo_run import run_policy, run_with_kill, warm_up
from forkkv_cluster.bench.demo_view import (
    agent_table,
    answer_table,
    check_lines,
    cost_line,
    make_console,
    policy_table,
    savings_line,
    streams_side_by_side,
)
from forkkv_cluster.bench.measurement import check_can_write
from forkkv_cluster.client import AsyncForkKVClient, Sharing
from forkkv_cluster.core.config import ClusterConfig, parse_config
from forkkv_cluster.core.errors import ForkKVError, InvalidArgument


class StartedCluster(Protocol):
    """The part of ``app.RunningCluster`` that the demo needs."""

    @property
    def grpc_address(self) -> str: ...

    def stop(self) -> None: ...


StartCluster = Callable[[ClusterConfig], StartedCluster]


def demo_config() -> ClusterConfig:
    """Two workers on free ports with the embedded casebook model. fp32, because runs are compared token by token."""
    return parse_config(
        {
            "model": {"dtype": "float32", "device": "cpu"},
            "worker": {"num_replicas": 2},
            "defaults": {"adapter_sharing": "isolated"},  # nothing is measured beside what is timed
            "gateway": {"session_store": "memory:"},
            "server": {"http_port": 0, "grpc_port": 0},
        }
    )


def make_demo(start_cluster: StartCluster) -> Callable[..., None]:
    """The command. The composition root brings ``start_cluster``, which nothing below it may import."""

    def demo(
        kill_worker: Annotated[
            bool, typer.Option("--kill-worker", help="Also run with the busiest worker killed by SIGKILL, and compare tokens.")
        ] = False,
        num_questions: Annotated[int, typer.Option("--questions", help="Questions to each agent.", min=1, max=4)] = 2,
        max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=16, max=256)] = 64,
        json_path: Annotated[Path | None, typer.Option("--json", help="Write all results here.")] = None,
    ) -> None:
        """Eight agents over one document: streamed side by side, joined, and measured with sharing and without.

        Starts a cluster of two workers on this machine, and stops it. The model is small and trained: it is asked about a
        casebook that it has never seen, and each answer is shown with whether it is right, under each policy.
        """
        console = make_console()
        try:
            check_can_write("--json", json_path)
            plan = casebook_plan(num_questions, max_tokens)
            checks = _run_demo(console, start_cluster, plan, kill_worker, json_path)
        except ForkKVError as error:
            Console(stderr=True).print(f"error {error.code}: {error.message}", markup=False, highlight=False)
            raise typer.Exit(2 if isinstance(error, InvalidArgument) else 1) from None
        if not all(check.holds for check in checks):
            raise typer.Exit(1)

    return demo


def _run_demo(
    console: Console, start_cluster: StartCluster, plan: DemoPlan, kill_worker: bool, json_path: Path | None
) -> list[Check]:
    started_s = time.monotonic()
    with console.status("starting Ray, Serve and two workers ..."):
        cluster = start_cluster(demo_config())
    # After the start, because Ray sets a handler of its own. A terminated demo stops its cluster, too.
    signal.signal(signal.SIGTERM, _leave)
    try:
        start_s, names = time.monotonic() - started_s, ", ".join(plan.adapters)
        console.print(f"A cluster of two workers came up in {start_s:.1f} s, with adapters {names}.")
        results, killed = asyncio.run(_run_all(console, cluster.grpc_address, plan, kill_worker))
    finally:
        with console.status("stopping ..."):
            cluster.stop()
    eager, isolated = results
    checks = check_policies(eager, isolated) + (check_kill(eager, killed) if killed is not None else [])
    runs = results if killed is None else [*results, killed]
    saved = savings(eager, isolated)
    for shown in (
        *map(agent_table, runs),
        answer_table(runs),
        policy_table(results),
        savings_line(saved),
        cost_line(saved),
        *check_lines(checks),
    ):
        console.print(shown)
    if json_path is not None:
        json_path.write_text(json.dumps(to_json(runs, saved, checks), indent=2) + "\n")
    return checks


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


async def _run_all(
    console: Console, address: str, plan: DemoPlan, kill_worker: bool
) -> tuple[list[PolicyResult], PolicyResult | None]:
    """Results under eager and isolated, and of the run with a kill, if wanted. Killing comes last: it costs a worker."""
    async with AsyncForkKVClient(address) as client:
        await warm_up(client)
        results = []
        for sharing in (Sharing.EAGER, Sharing.ISOLATED):
            with streams_side_by_side(console, str(sharing)) as on_update:
                results.append(await run_policy(client, plan, sharing, on_update))
        if not kill_worker:
            return results, None
        with streams_side_by_side(console, "eager, one worker will be killed") as on_update:
            return results, await run_with_kill(client, plan, Sharing.EAGER, on_update)
