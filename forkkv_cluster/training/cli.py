"""``forkkv train-adapter``: train a LoRA for the sharing that it will be served with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.terminal import errors_for_people, progress

if TYPE_CHECKING:
    from forkkv_cluster.training.lora_model import LoraShape
    from forkkv_cluster.training.run import TrainingReport


def train_adapter(
    model: Annotated[Path, typer.Argument(help="Hugging Face checkpoint directory of the base model.", exists=True)],
    data: Annotated[
        Path, typer.Argument(help='JSON lines {"context", "prompt", "completion"}: text or token ids.', exists=True)
    ],
    out: Annotated[Path, typer.Option(help="Where the PEFT directory is written; must be new or empty.")],
    semantics: Annotated[Sharing, typer.Option(help="The sharing that the adapter will be served under.")] = Sharing.EAGER,
    from_adapter: Annotated[
        Path | None,
        typer.Option(
            help="Convert this PEFT adapter: learn what it answers `isolated`. No completions are needed.", exists=True
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help=r"Rank. \[default: 16, or that of --from-adapter]", min=1)] = None,
    alpha: Annotated[float | None, typer.Option(help=r"LoRA alpha. \[default: twice the rank]")] = None,
    targets: Annotated[
        str | None, typer.Option(help=r"Linear modules, separated by commas. \[default: all seven, or those of --from-adapter]")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout of the LoRA's input.", min=0.0, max=0.9)] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the data.", min=1)] = 3,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps at most.", min=1)] = None,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Peak learning rate of AdamW; small models want more, such as 1e-3.")
    ] = 3e-4,
    contexts_per_step: Annotated[int, typer.Option(help="Contexts in a step.", min=1)] = 4,
    branches_per_context: Annotated[
        int, typer.Option(help="Branches that share one pass over their context, at most.", min=1)
    ] = 8,
    prompt_weight: Annotated[
        float, typer.Option(help="Weight of the prompt's tokens in the loss; the completion's is 1.", min=0.0, max=1.0)
    ] = 0.0,
    eval_data: Annotated[Path | None, typer.Option(help="JSON lines to measure before and after.", exists=True)] = None,
    completion_tokens: Annotated[
        int, typer.Option(help="Length of completions that --from-adapter writes, at most.", min=1)
    ] = 64,
    seed: Annotated[int, typer.Option(help="Of initial weights, order and dropout.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU, float32 on a CPU), float32 or bfloat16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Train a LoRA under the semantics that it will be served with.

    An adapter trained in the ordinary way has only seen contexts that it encoded itself. Under `eager` sharing it reads the
    base model's keys and values plus its own low-rank residual of them, and loses some of its skill: little or all of it,
    depending on the role. Trained here it reads during training what it will read in production.

    The result is an ordinary PEFT directory; its forkkv.json names the sharing, `forkkv status` shows it, and a request that
    is served under another one says so. Convert an adapter that you have, without labels:

        forkkv train-adapter ./llama data.jsonl --from-adapter ./planner --out ./planner-eager

    Lines of equal context become branches of one pass, so write many questions to each context.
    """
    with errors_for_people():
        # Here: torch takes seconds that `forkkv --help` need not wait for.
        from forkkv_cluster.training.run import TrainingJob
        from forkkv_cluster.training.run import train_adapter as run
        from forkkv_cluster.training.trainer import TrainingSettings

        settings = TrainingSettings(
            sharing=semantics, epochs=epochs, max_steps=max_steps, learning_rate=learning_rate, seed=seed,
            contexts_per_step=contexts_per_step, branches_per_context=branches_per_context, prompt_weight=prompt_weight,
        )  # fmt: skip
        job = TrainingJob(
            model, data, out, settings, _shape(rank, alpha, targets, dropout, from_adapter), from_adapter, eval_data,
            completion_tokens, device, dtype,
        )  # fmt: skip
        with progress() as on_progress:
            report = run(job, on_progress)
    typer.echo(json.dumps(asdict(report), indent=2)) if as_json else _print(report)


def _shape(
    rank: int | None, alpha: float | None, targets: str | None, dropout: float, teacher: Path | None
) -> LoraShape | None:
    """None where the student is to be a copy of the adapter that it learns from."""
    from forkkv_cluster.training.lora_model import ALL_LINEAR, LoraShape

    if teacher is not None and rank is None and targets is None:
        if alpha is not None or dropout:
            problem = "is of a new adapter, and a copy of --from-adapter has its own"
            raise InvalidArgument(
                "--alpha" if alpha is not None else "--dropout", alpha or dropout, problem, "Name a --rank, too."
            )
        return None
    names = tuple(targets.split(",")) if targets is not None else ALL_LINEAR
    unknown = sorted(set(names) - set(ALL_LINEAR))
    if unknown:
        raise InvalidArgument("--targets", targets, f"names {unknown[0]!r}", f"Use some of {','.join(ALL_LINEAR)}.")
    return LoraShape(rank or 16, alpha if alpha is not None else 2.0 * (rank or 16), names, dropout)


def _print(report: TrainingReport) -> None:
    typer.echo(
        f"{report.directory}: trained for {report.trained_for} from {report.learnt_from}, {report.num_steps} steps over "
        f"{report.num_branches} branches of {report.num_contexts} contexts in {report.seconds:.0f} s; "
        f"loss {report.first_loss:.4f} -> {report.last_loss:.4f}"
    )
    if report.quality:
        table = Table("adapter", "cross entropy", "tokens right", "completions exact", box=None)
        for name, quality in report.quality.items():
            table.add_row(
                name, f"{quality.cross_entropy:.4f}", f"{quality.token_accuracy:.2%}",
                f"{quality.exact_share:.2%} of {quality.num_completions}",
            )  # fmt: skip
        Console().print(table)
