"""``forkkv measure-repair``: what recomputing a share of the context would buy back of an adapter's loss under sharing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.terminal import errors_for_people, progress

if TYPE_CHECKING:
    from forkkv_cluster.training.repair import Measure, RepairPoint

_SHARES = "0,0.05,0.1,0.2,0.3,0.5,1"


def measure_repair(
    model: Annotated[Path, typer.Argument(help="Hugging Face checkpoint directory of the base model.", exists=True)],
    data: Annotated[Path, typer.Argument(help="JSON lines as of train-adapter; completions may be missing.", exists=True)],
    adapter: Annotated[Path, typer.Option(help="PEFT directory of the adapter.", exists=True)],
    sharing: Annotated[Sharing, typer.Option(help="The sharing that is repaired.")] = Sharing.EAGER,
    shares: Annotated[str, typer.Option(help="Shares of the context's tokens that run again, separated by commas.")] = _SHARES,
    measures: Annotated[
        str | None, typer.Option(help=r"How they are chosen: attention, deviation, last, random. \[default: all]")
    ] = None,
    branches: Annotated[int, typer.Option(help="Branches of a context that choose its tokens together.", min=1)] = 1,
    block_size: Annotated[int, typer.Option(help="Tokens that run again together, as those of a page would.", min=1)] = 1,
    completion_tokens: Annotated[int, typer.Option(help="Length of completions that are missing, at most.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of the random choice.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU, float32 on a CPU), float32 or bfloat16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the points as one JSON object.")] = False,
) -> None:
    """Measure what repair would buy: run a share of the shared context again, under the agent's own adapter.

    A share of 0 is the sharing itself, 1 is `isolated`. Between them, an adapter that reads its context in a way of its
    own gains from few tokens only if a cheap measure finds the ones that matter: compare each with `random`.

        forkkv measure-repair ./llama held-out.jsonl --adapter ./planner
    """
    with errors_for_people():
        # Here: torch takes seconds that `forkkv --help` need not wait for.
        from forkkv_cluster.training.examples import read_examples
        from forkkv_cluster.training.lora_model import load_tokenizer, open_model
        from forkkv_cluster.training.repair import RepairSweep
        from forkkv_cluster.training.teacher import complete

        wanted_shares, wanted_measures = _shares(shares), _measures(measures)
        lora = open_model(model, sharing, teacher_dir=adapter, device=device, dtype=dtype)
        read = read_examples(
            data, load_tokenizer(model), vocab_size=lora.config.vocab_size, max_len=lora.max_len, has_completions=False
        )
        with progress() as on_progress:
            examples = complete(
                lora,
                read.contexts,
                max_tokens=completion_tokens,
                on_completed=lambda done, total: on_progress("completing", done, total, data.name),
            )
            sweep = RepairSweep(lora, sharing, branches, block_size, seed)
            points = sweep.run(
                examples, wanted_shares, wanted_measures, lambda done, total: on_progress("repairing", done, total, "contexts")
            )
    if as_json:
        how = {"sharing": sharing, "branches": branches, "block_size": block_size}
        typer.echo(json.dumps({**how, "points": [asdict(point) for point in points]}, indent=2))
    else:
        Console().print(_table(points))


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise InvalidArgument("--shares", text, "are no numbers from 0 to 1", f"Write, for example, {_SHARES}.")
    return shares


def _measures(text: str | None) -> Sequence[Measure]:
    from forkkv_cluster.training.repair import MEASURES, Measure

    names = text.split(",") if text is not None else list(MEASURES)
    unknown = sorted(set(names) - set(get_args(Measure)))
    if unknown:
        raise InvalidArgument("--measures", text, f"names {unknown[0]!r}", f"Use some of {', '.join(MEASURES)}.")
    return [cast("Measure", name) for name in names]


def _table(points: Sequence[RepairPoint]) -> Table:
    """Agreement with ``isolated`` and KL, a row for each share, a column for each measure."""
    measures = list(dict.fromkeys(point.measure for point in points))
    by_place = {(point.measure, point.share): point for point in points}
    table = Table("repaired", *measures, box=None, title="agreement with isolated (KL)", title_justify="left")
    for share in dict.fromkeys(point.share for point in points):
        found = (by_place[measure, share] for measure in measures)
        table.add_row(f"{share:.0%}", *(f"{point.agreement:.2%} ({point.kl:.4f})" for point in found))
    return table
