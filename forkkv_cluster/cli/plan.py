"""``forkkv plan``: what agents over one context would cost on a card, before one is rented."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from forkkv_cluster.cli.common import errors_for_people, size
from forkkv_cluster.core.config import parse_bytes
from forkkv_cluster.core.cost_model.cards import CARDS, card_named
from forkkv_cluster.core.cost_model.memory import Policy
from forkkv_cluster.core.cost_model.plan import Plan, PolicyPlan, make_plan
from forkkv_cluster.core.cost_model.shapes import KNOWN_SHAPES, LoraShape, ModelShape, Workload, shape_of
from forkkv_cluster.core.errors import InvalidArgument

HELP = f"""What agents over one shared context cost on a card: KV bytes, agents that fit, floor times, tokens a second.

Arithmetic alone: nothing is loaded, no card is needed. MODEL is a checkpoint directory (only its config.json is read) or one of
{", ".join(shape.name for shape in KNOWN_SHAPES.values())}.

Each row is a way to use the context ([bold]sharing[/]), beside agents without adapters, the ceiling:

[bold]isolated[/]  every adapter prefills and keeps KV of its own, as other engines do
[bold]residual[/]  base KV once; every adapter runs the context again and keeps x A_k and x A_v of it
[bold]eager[/]     base KV once; the base model's pass writes the residuals of all declared adapters
[bold]base[/]      base KV once; adapters act from the fork on

[bold]floor[/] is what the card's two ceilings allow (bytes and matrix products a second; padding counted), [bold]exp.[/]ected
takes off what kernels usually lose. Both leave out the host. Agents that do not fit take turns, and prefill again.

Examples: [bold]forkkv plan llama-3.1-8b[/];
[bold]forkkv plan ./my-model --card a100 --context 64k --agents 32 --adapters 8 --rank 32 --targets q,v[/].
Numbers that you measured ([bold]python kernels/benchmarks/run.py[/] prints them) go into --tb-per-s and --tflop-per-s.
"""


def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, or a known model's name.")],
    card: Annotated[str, typer.Option(help=f"{', '.join(known.name for known in CARDS.values())}.")] = "H100",
    context: Annotated[str, typer.Option(help="Tokens of the shared context; 32k is 32768.")] = "32k",
    agents: Annotated[int, typer.Option(help="Agents that fork it.", min=1)] = 16,
    adapters: Annotated[int | None, typer.Option(help=r"Distinct adapters among them. \[default: one each]", min=1)] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 16,
    targets: Annotated[str, typer.Option(help="Modules with LoRA: some of q,k,v,o,gate,up,down.")] = "q,k,v,o",
    turns: Annotated[int, typer.Option(help="Turns of each agent.", min=1)] = 3,
    input_tokens: Annotated[int, typer.Option("--in", help="Tokens that a turn appends.", min=1)] = 128,
    output_tokens: Annotated[int, typer.Option("--out", help="Tokens that a turn generates.", min=1)] = 128,
    memory: Annotated[str | None, typer.Option(help="Memory of the card, for example 80GiB.")] = None,
    tb_per_s: Annotated[float | None, typer.Option(help="Measured copy rate, bytes read and written.", min=0.001)] = None,
    tflop_per_s: Annotated[float | None, typer.Option(help="Measured rate of a large bf16 matrix product.", min=0.001)] = None,
    utilization: Annotated[float, typer.Option(help="Share of the memory that is used.", min=0.01, max=1.0)] = 0.9,
    reserve: Annotated[str, typer.Option(help="Of it, for activations, graphs and workspaces.")] = "2GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    with errors_for_people():
        lora = LoraShape(rank, tuple(target.strip() for target in targets.split(",")))
        workload = Workload(parse_tokens(context), agents, adapters or agents, turns, input_tokens, output_tokens, lora)
        memory_bytes = _bytes("memory", memory) if memory is not None else None
        chosen = card_named(card).with_measured(memory_bytes, tb_per_s, tflop_per_s)
        made = make_plan(read_shape(model), chosen, workload, utilization=utilization, reserve_bytes=_bytes("reserve", reserve))
    if as_json:
        typer.echo(json.dumps(as_object(made), indent=2))
        return
    console = Console()
    console.print(headline(made))
    console.print(plan_table(made))
    console.print(footer(made))


def read_shape(model: str) -> ModelShape:
    """Raises InvalidArgument for what is neither a directory with a config.json nor a known name."""
    path = Path(model) / "config.json"
    if path.exists():
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise InvalidArgument("model", str(path), f"is not JSON ({error})", "Download or save it again.") from None
        return shape_of(config, Path(model).resolve().name)
    if model.lower() not in KNOWN_SHAPES:
        known = ", ".join(shape.name for shape in KNOWN_SHAPES.values())
        remedy = f"Name a checkpoint directory or one of {known}."
        raise InvalidArgument("model", model, "is neither a directory with a config.json nor a known name", remedy)
    return KNOWN_SHAPES[model.lower()]


def parse_tokens(text: str) -> int:
    """``32768`` or ``32k`` -> tokens. Raises InvalidArgument."""
    number = text.lower().removesuffix("k")
    if not number.isdigit() or int(number) == 0:
        raise InvalidArgument("context", text, "is not a number of tokens", "Write, for example, 32768 or 32k.")
    return int(number) * (1024 if text.lower().endswith("k") else 1)


def _bytes(field: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise InvalidArgument(field, text, str(error), "Write, for example, 80GiB.") from None


def as_object(plan: Plan) -> dict[str, Any]:
    """The plan with what follows from it, for other programs."""
    found = asdict(plan)
    found["model"] |= {
        "weight_bytes": plan.model.weight_bytes,
        "base_bytes_per_token": plan.model.base_bytes_per_token,
        "residual_bytes_per_token": plan.workload.lora.residual_bytes_per_token(plan.model),
    }
    for policy, values in zip(plan.policies, found["policies"], strict=True):
        values["kv_bytes"] = policy.kv.total
        values["ratio_to_isolated"] = plan.ratio(policy.policy)
        values["ratio_to_no_adapters"] = plan.ratio(policy.policy, Policy.NO_ADAPTERS)
    return found


def headline(plan: Plan) -> str:
    model, card, workload = plan.model, plan.card, plan.workload
    residual = workload.lora.residual_bytes_per_token(model)
    return (
        f"[bold]{model.name}[/] {size(model.weight_bytes)} of weights, KV a token {size(model.base_bytes_per_token)}, "
        f"residual {size(residual)} an adapter (rank {workload.lora.rank} on {','.join(workload.lora.targets)})\n"
        f"[bold]{card.name}[/] {card.tb_per_s:.2f} TB/s, {card.tflop_per_s:.0f} TFLOP/s ({card.source}), "
        f"{size(plan.pool_bytes)} left for KV\n"
        f"{workload.agents} agents, {workload.adapters} adapters, {workload.context} shared tokens, "
        f"{workload.turns} turns of {workload.input} in and {workload.output} out"
    )


def plan_table(plan: Plan) -> Table:
    """One row a policy."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("sharing")
    for column in (
        "KV",
        "agents\nfit",
        "context\nready",
        "fork's\nTTFT",
        "decode step\nfloor, exp.",
        "output\ntok/s",
        "x iso-\nlated",
    ):
        table.add_column(column, justify="right")
    for made in plan.policies:
        table.add_row(*_row(plan, made))
    return table


def _row(plan: Plan, made: PolicyPlan) -> list[str]:
    ratio = plan.ratio(made.policy)
    step = (
        "" if made.decode_step_s is None else f"{1e3 * (made.decode_step_floor_s or 0):.1f}, {1e3 * made.decode_step_s:.1f} ms"
    )
    return [
        made.policy.value,
        size(made.kv.total),
        f"{made.capacity}" if made.fits else f"[red]{made.capacity}[/]",
        duration(made.context_s),
        duration(made.fork_ttft_s),
        step,
        "none fits" if made.output_tokens_per_s is None else f"{made.output_tokens_per_s:.0f}",
        "" if ratio is None else f"{ratio:.1f}",
    ]


def duration(seconds: float) -> str:
    """0.0234 -> 23 ms; 2.34 -> 2.3 s."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def footer(plan: Plan) -> str:
    lines = ["context ready: all passes over the context before the last agent starts; fork's TTFT: one more adapter later."]
    longest = plan.workload.context + plan.workload.own_tokens
    if longest > plan.model.max_position:
        lines.append(f"Agents end at {longest} tokens, beyond the {plan.model.max_position} positions of {plan.model.name}.")
    waiting = [made.policy.value for made in plan.policies if not made.fits]
    if waiting:
        lines.append(f"Not all agents fit at once: {', '.join(waiting)}. They take turns; what a turn evicts is run again.")
    return "\n".join(f"[dim]{line}[/]" for line in lines)
