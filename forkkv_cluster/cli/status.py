"""``forkkv status``: the cluster as one table, or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from forkkv_cluster.cli.common import DEFAULT_ADDRESS, Address, Token, errors_for_people, size
from forkkv_cluster.client import ForkKVClient, Status
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.core.status import ClusterStatus, EngineStatus

MAX_ADAPTERS = 16
"""Adapters that are named without ``--all``."""


def status(
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="Name every adapter, not only those in use: resident ones, and who holds most KV.")
    ] = False,
) -> None:
    """Show the model, every worker with its KV memory, whose it is and what sharing saves, where adapters are, sessions."""
    with errors_for_people(), ForkKVClient(address, token=token, timeout_s=10.0) as client:
        found = client.status()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    console = Console()
    console.print(_headline(found))
    console.print(worker_table(found))
    console.print(memory_table(found))
    console.print(adapter_table(found))
    if any(is_told(info) for info in found.cluster.adapters):
        console.print(sharing_table(found))
    console.print(_footer(found))
    console.print(adapters_line(found.cluster, None if show_all else MAX_ADAPTERS))


def _headline(found: Status) -> str:
    model = found.model
    return (
        f"[bold]{model.name}[/] {model.dtype}, up to {model.max_model_len} tokens, "
        f"{size(model.base_bytes_per_token)} of base KV a token · server {found.cluster.version}"
    )


def worker_table(found: Status) -> Table:
    """One row a worker; prefill, hits (useful) and output are tokens since it started."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)  # The box itself parts the columns: 80 characters are few.
    for name in ("worker", "pid", "run/wait", "base KV", "residual", "prefill", "hits", "output"):
        table.add_column(name, no_wrap=True)
    for worker in found.cluster.workers:
        engine, counters = worker.engine, worker.engine.counters
        table.add_row(
            worker.worker_id.removeprefix("worker-"),
            str(worker.pid),
            f"{engine.num_running}/{engine.num_waiting}",
            size(engine.base_bytes_held),
            size(engine.residual_bytes_held),
            str(counters.prefill_tokens_run),
            str(counters.useful_hit_tokens),
            str(counters.output_tokens),
        )
    return table


def memory_table(found: Status) -> Table:
    """One row a worker: what sharing saves, the host tier, and the three largest holders of each kind.

    ``saved`` is bytes that caches of each adapter's own would need, less what is held, and prompt tokens that never ran.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("worker", "saved by sharing", "host tier", "swapped out/in", "tenants", "adapters", "kept sessions"):
        table.add_column(name)
    for worker in found.cluster.workers:
        engine, counters = worker.engine, worker.engine.counters
        saved = engine.sharing_saved_bytes
        table.add_row(
            worker.worker_id,
            f"{'-' if saved < 0 else ''}{size(abs(saved))}, {counters.useful_hit_tokens} tokens",
            f"{size(engine.host_bytes_held)} of {size(engine.host_bytes_total)}" if engine.host_bytes_total else "none",
            f"{size(counters.swapped_out_bytes)}/{size(counters.swapped_in_bytes)}",
            *(_largest(engine, kind) for kind in ("tenant", "adapter", "session")),
        )
    return table


def adapter_table(found: Status) -> Table:
    """One row a worker: where the weights of the adapters that it knows are, and the KV memory that their whole keys borrow.

    ``slots`` are of the device, taken and in all, ``in use`` those that sequences hold; ``reads`` are from disk since the
    worker started, registrations not included.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("worker", "known", "slots", "in use", "device", "on host", "host", "reads", "merged keys"):
        table.add_column(name, no_wrap=True)
    for worker in found.cluster.workers:
        memory = worker.engine.adapter_memory
        table.add_row(
            worker.worker_id.removeprefix("worker-"),
            str(memory.num_registered),
            f"{memory.num_on_device}/{memory.max_on_device}",
            str(memory.num_pinned),
            size(memory.device_bytes),
            str(memory.num_on_host),
            size(memory.host_bytes),
            str(memory.disk_loads),
            size(worker.engine.merged_bytes_held),
        )
    return table


def is_told(info: AdapterInfo) -> bool:
    """Whether there is more to say of ``auto`` on this adapter than that it was not measured."""
    return info.verdict is not None and not info.verdict.is_plain


def sharing_table(found: Status) -> Table:
    """One row an adapter that was measured or named for ``auto``: how it is served, what was measured, what drifts.

    ``measured`` is disagreement with the reference and its upper bound, ``drift`` the same of served branches on the worker
    where it is largest.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("adapter", "auto is", "because", "measured", "drift"):
        table.add_column(name, no_wrap=name in ("adapter", "measured"), overflow="fold")  # Reasons break, figures do not.
    for info in found.cluster.adapters:
        verdict = info.verdict
        if verdict is None or not is_told(info):
            continue
        measured = [f"{e.sharing} {e.agreement.disagreement:.2%} (≤{e.agreement.upper_bound:.2%})" for e in verdict.measured]
        table.add_row(
            info.name,
            f"{verdict.sharing} ({verdict.state})",
            verdict.reason,
            "\n".join(measured) or "none",
            _largest_drift(found, info),
        )
    return table


def _largest_drift(found: Status, info: AdapterInfo) -> str:
    drifts = [d for worker in found.cluster.workers for d in worker.engine.drift if d.digest == info.digest]
    if not drifts:
        return "none probed"
    worst = max(drifts, key=lambda drift: drift.agreement.disagreement)
    return f"{worst.sharing} {worst.agreement.disagreement:.2%} of {worst.agreement.num_positions}"


def _largest(engine: EngineStatus, kind: str, limit: int = 3) -> str:
    held = [holding for holding in engine.holdings if holding.kind == kind]
    named = [f"{holding.name or '(none)'} {size(holding.num_bytes)}" for holding in held[:limit]]
    return ", ".join([*named, *([f"{len(held) - limit} more"] if len(held) > limit else [])]) or "none"


def _footer(found: Status) -> str:
    cluster, directory = found.cluster, found.cluster.directory
    known = (
        f"directory knows {directory.num_base_blocks} base and {directory.num_residual_blocks} residual blocks "
        f"of {directory.num_workers} workers"
        if directory is not None
        else "[yellow]directory away: routing goes on from the gateway's mirror[/]"
    )
    return f"{known} · {cluster.num_sessions} sessions, {cluster.num_branches} branches"


def adapters_line(cluster: ClusterStatus, limit: int | None) -> str:
    """The registered adapters by name: at most ``limit``, unless None, of those whose weights are on some worker's device or
    which hold KV, who holds most first, and how many more there are. All where they are no more than ``limit``."""
    engines = [worker.engine for worker in cluster.workers]
    resident = {info.name for engine in engines for info in engine.adapters if info.is_resident}
    held: Counter[str] = Counter()
    for engine in engines:
        held.update({holding.name: holding.num_bytes for holding in engine.holdings if holding.kind == "adapter"})

    def rank(info: AdapterInfo) -> tuple[int, bool, str]:
        return -held[info.name], info.name not in resident, info.name

    shown = sorted(cluster.adapters, key=rank)
    if limit is not None and len(shown) > limit:
        shown = [info for info in shown if held[info.name] or info.name in resident][:limit]
    facts = (
        [f"rank {info.lora_rank}", *([f"trained for {info.trained_for}"] if info.trained_for is not None else [])]
        + ["resident"] * (info.name in resident)
        + [size(held[info.name])] * (held[info.name] > 0)
        for info in shown
    )
    named = [f"{info.name} ({', '.join(known)})" for info, known in zip(shown, facts, strict=True)]
    num_more = len(cluster.adapters) - len(shown)
    if num_more:
        left = sum(info.name in resident for info in cluster.adapters) - sum(info.name in resident for info in shown)
        named.append(f"{num_more} more, {left} of them resident (--all names them)")
    return f"adapters: {', '.join(named) or 'none'}"
