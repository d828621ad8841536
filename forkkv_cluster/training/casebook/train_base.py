"""Train the casebook model: ``python -m forkkv_cluster.training.casebook.train_base --help``.

The curriculum goes from half a dozen facts to several hundred (``batches.BUCKETS``): recall is found on short contexts,
then carried to long ones. Interrupted, the same command goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from forkkv_cluster.training.casebook.batches import BUCKETS, CasebookBatches
from forkkv_cluster.training.casebook.evaluation import held_out_scores
from forkkv_cluster.training.casebook.loop import Plan, Trainer, answer_logits
from forkkv_cluster.training.casebook.model import ModelShape, circuit_of, new_model
from forkkv_cluster.training.casebook.roles import BASE_ROLES
from forkkv_cluster.training.casebook.tokenizer import Encoder, save_tokenizer

MIXTURE = {"lookup": 0.72, "asked_for_json": 0.18, "record": 0.04, "repeat": 0.06}
"""How often each of the base model's roles is asked in training."""
LENGTHS = (64, 128, 256, 512, 1024, 2048)


def main(
    directory: Annotated[Path, typer.Argument(help="Where tokenizer, weights, log, scores and checkpoint go.")],
    layers: int = 3,
    hidden: int = 256,
    mlp: int = 1024,
    heads: int = 4,
    head_dim: int = 128,
    lr: float = 5e-4,
    slow_share: Annotated[
        float, typer.Option(help="Part of the learning rate for the circuit that training begins with.")
    ] = 0.3,
    theta: Annotated[float, typer.Option(help="RoPE's base.")] = ModelShape().rope_theta,
    steps: int = 30_000,
    max_seconds: Annotated[float, typer.Option(help="End, with the learning rate fallen, after so long.")] = float("inf"),
    decay_share: Annotated[float, typer.Option(help="Last part of the training, over which the learning rate falls.")] = 0.35,
    batch_tokens: int = 32_768,
    stage: Annotated[int, typer.Option(help="Bucket to begin with.")] = 0,
    last_stage: Annotated[int, typer.Option(help="Bucket to end with: how long contexts get.")] = len(BUCKETS) - 1,
    init_from: Annotated[Path | None, typer.Option(help="Weights to begin with: a model's directory.")] = None,
    seed: int = 0,
    workers: Annotated[int, typer.Option(help="Processes that draw casebooks; 0: none but this one.")] = 0,
    threads: int = 1,
    num_examples: Annotated[int, typer.Option(help="Held-out examples for each role and length.")] = 200,
    longest: Annotated[int, typer.Option(help="Longest held-out contexts, in tokens.")] = 2048,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train on the casebooks of ``seed`` and score on held-out ones."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    where = torch.device(device)
    model_dir = directory / "model"
    save_tokenizer(model_dir)
    encoder = Encoder(model_dir)
    shape = ModelShape(layers, hidden, mlp, heads, head_dim, rope_theta=theta)
    model = new_model(shape, encoder.size, (encoder.pad, encoder.bos, encoder.eos), seed).to(where)
    if init_from is not None:
        _load(model, init_from)
    plan = Plan(
        steps, max_seconds, lr, slow_share, decay_share=decay_share, last_stage=last_stage, seed=seed, num_workers=workers
    )
    batches = CasebookBatches(model_dir, MIXTURE, seed=seed, batch_tokens=batch_tokens, stage=stage)
    logits_of = answer_logits(model)
    dtype = torch.bfloat16 if where.type == "cuda" else None

    def evaluate(count: int = min(64, num_examples)) -> dict[str, Any]:
        lengths = [length for length in LENGTHS if length <= longest]
        return held_out_scores(logits_of, encoder, tuple(BASE_ROLES), lengths, count=count, device=where, dtype=dtype)

    trainer = Trainer(
        model.parameters(),
        logits_of,
        batches,
        plan,
        directory,
        lambda: save_bf16(model, model_dir),
        where,
        circuit_of(model),
        evaluate,
    )
    trainer.run()
    facts = {"shape": asdict(shape), "plan": asdict(replace(plan, max_seconds=min(max_seconds, 1e9)))}
    scores = {"steps": trainer.step, "tokens": trainer.tokens, **facts, "held_out": evaluate(num_examples)}
    (directory / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    typer.echo(json.dumps(scores["held_out"]))


def save_bf16(model: Any, directory: Path) -> None:
    """As a Hugging Face directory; written beside and renamed, so that a reader never sees half of it."""
    import copy

    from forkkv_cluster.testing.tiny_models import quiet_hub

    staging = directory.with_name(f"{directory.name}.partial")
    with quiet_hub():
        copy.deepcopy(model).to(device="cpu", dtype=torch.bfloat16).save_pretrained(str(staging))
    for path in staging.iterdir():
        path.replace(directory / path.name)
    shutil.rmtree(staging)


def _load(model: Any, directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, local_files_only=True)
    model.load_state_dict(loaded.state_dict())


if __name__ == "__main__":
    typer.run(main)
