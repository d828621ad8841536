"""Train role adapters on the casebook model by PEFT: ``python -m forkkv_cluster.training.casebook.train_adapters --help``.

Ordinary LoRA training, as a user would do it: the whole sequence, context and branch, goes through the adapter, and the loss
is on the answers. An aLoRA leaves everything before its invocation to the base, as PEFT has it (``activated``).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from forkkv_cluster.testing.tiny_models import quiet_hub, sort_targets
from forkkv_cluster.training.casebook.activated import turn_logits
from forkkv_cluster.training.casebook.adapter_specs import ADAPTERS, AdapterSpec
from forkkv_cluster.training.casebook.batches import BUCKETS, FIRST_FULL, CasebookBatches
from forkkv_cluster.training.casebook.evaluation import held_out_scores
from forkkv_cluster.training.casebook.loop import LogitsOf, Plan, Trainer, answer_logits
from forkkv_cluster.training.casebook.tokenizer import INVOCATION, Encoder

LENGTHS = (256, 512, 1024, 2048)
_BASE_NAME = "casebook"


def main(
    model_dir: Annotated[Path, typer.Argument(help="The casebook model.")],
    directory: Annotated[Path, typer.Argument(help="Each adapter goes into a folder of its name in here.")],
    names: Annotated[list[str] | None, typer.Argument(help="Which; all by default.")] = None,
    steps: int = 4_000,
    max_seconds: Annotated[float, typer.Option(help="For each adapter.")] = float("inf"),
    batch_tokens: int = 8_192,
    stage: Annotated[int, typer.Option(help="Longest contexts to begin with, by bucket.")] = len(BUCKETS) - 1,
    lr: Annotated[float | None, typer.Option(help="Instead of the adapter's own.")] = None,
    seed: int = 0,
    workers: Annotated[int, typer.Option(help="Processes that draw casebooks; 0: none but this one.")] = 0,
    threads: int = 1,
    num_examples: Annotated[int, typer.Option(help="Examples for each length and split.")] = 200,
    longest: Annotated[int, typer.Option(help="Longest held-out contexts, in tokens.")] = 2048,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train, save and score adapters, one after the other."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    for name in names or ADAPTERS:
        spec = ADAPTERS[name]
        plan = Plan(steps, max_seconds, lr or spec.lr, warmup_steps=100, decay_share=0.5, weight_decay=0.0, num_workers=workers)
        lengths = [length for length in LENGTHS if length <= longest]
        run = _Run(spec, model_dir, directory / name, torch.device(device), seed)
        run.train(plan, batch_tokens, stage)
        scores = run.scores(lengths, num_examples)
        (directory / name / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
        typer.echo(json.dumps({"adapter": name, **scores["accuracy"]}))


class _Run:
    def __init__(self, spec: AdapterSpec, model_dir: Path, directory: Path, device: torch.device, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        self._spec, self._model_dir, self._directory, self._device, self._seed = spec, model_dir, directory, device, seed
        self._encoder = Encoder(model_dir)
        base = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32, local_files_only=True)
        base.name_or_path = _BASE_NAME  # what peft writes as the adapter's base model
        torch.manual_seed(seed)
        self._model = _adapted(base, spec, self._encoder).to(device)

    @property
    def _logits_of(self) -> LogitsOf:
        if self._spec.is_activated:
            return turn_logits(self._model, self._encoder.words(INVOCATION), self._encoder.eos)
        return answer_logits(self._model.get_base_model())

    def train(self, plan: Plan, batch_tokens: int, stage: int) -> None:
        batches = CasebookBatches(
            self._model_dir,
            {self._spec.role: 1.0},
            seed=self._seed,
            batch_tokens=batch_tokens,
            stage=stage,
            share_of_stage=0.2,
            lowest=min(stage, FIRST_FULL),
        )
        trainer = Trainer(self._model.parameters(), self._logits_of, batches, plan, self._directory, self._save, self._device)
        trainer.run()
        self._steps = trainer.step

    def _save(self) -> None:
        import copy

        with quiet_hub():
            adapter = copy.deepcopy(self._model).to(device="cpu", dtype=torch.bfloat16)
            adapter.save_pretrained(str(self._directory), save_embedding_layers=False)
        sort_targets(self._directory / "adapter_config.json")
        (self._directory / "README.md").unlink(missing_ok=True)  # peft's model card, an empty form

    def scores(self, lengths: list[int], count: int) -> dict[str, Any]:
        """Accuracy on held-out casebooks, on those of training, and of the base model on the held-out ones."""
        dtype = torch.bfloat16 if self._device.type == "cuda" else None

        def score(split: Any) -> dict[str, Any]:
            role = self._spec.role
            found = held_out_scores(
                self._logits_of, self._encoder, [role], lengths, count=count, device=self._device, split=split, dtype=dtype
            )
            return dict(found[role])

        with torch.no_grad(), self._model.disable_adapter():
            base = score("held_out")
        accuracy = {"held_out": score("held_out"), "training": score("train"), "base": base}
        return {"spec": asdict(self._spec), "steps": self._steps, "accuracy": accuracy}


def _adapted(base: Any, spec: AdapterSpec, encoder: Encoder) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        task_type="CAUSAL_LM",
        alora_invocation_tokens=encoder.words(INVOCATION) if spec.is_activated else None,
    )
    with quiet_hub():
        return get_peft_model(base, config)


if __name__ == "__main__":
    typer.run(main)
