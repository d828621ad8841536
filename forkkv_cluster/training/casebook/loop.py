"""The training loop of the base model and of its adapters: loss on answers, a log line now and then, checkpoints."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from forkkv_cluster.training.casebook.batches import BUCKETS, Batch, CasebookBatches, loader

__all__ = ["LogitsOf", "Plan", "Trainer", "answer_logits"]

LogitsOf: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(input_ids [n, m], at [k]) -> logits [k, vocab] of positions in the flattened input_ids."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``steps`` and ``max_seconds``: whichever is used up first ends training, and the learning rate falls to nothing by
    then, over the last ``decay_share``. ``slow_share`` is that of the learning rate which slow
    parameters get. ``stages_share``: the part by whose end every stage has begun."""

    steps: int
    max_seconds: float = math.inf
    lr: float = 5e-4
    slow_share: float = 0.3
    warmup_steps: int = 100
    decay_share: float = 0.35
    stages_share: float = 0.6
    last_stage: int = len(BUCKETS) - 1
    weight_decay: float = 0.02
    seed: int = 0
    num_workers: int = 0
    check_every: int = 20
    log_every: int = 100
    checkpoint_every_s: float = 60.0


def answer_logits(model: Any) -> LogitsOf:
    """Of a LlamaForCausalLM: only the wanted positions go through the head."""

    def logits_of(input_ids: Tensor, at: Tensor) -> Tensor:
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        logits: Tensor = model.lm_head(hidden.flatten(0, 1)[at])
        return logits

    return logits_of


@dataclass
class Trainer:
    """Trains ``parameters`` on ``batches``; ``save`` writes the weights. Resumes from ``directory/checkpoint.pt``."""

    parameters: Iterable[torch.nn.Parameter]
    logits_of: LogitsOf
    batches: CasebookBatches
    plan: Plan
    directory: Path
    save: Callable[[], None]
    device: torch.device
    slow: Sequence[torch.nn.Parameter] = ()
    evaluate: Callable[[], dict[str, Any]] | None = None
    evaluate_every_s: float = 120.0
    step: int = 0
    tokens: int = 0
    seconds_before: float = 0.0

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.parameters = [p for p in self.parameters if p.requires_grad]
        slow = {id(p) for p in self.slow}
        decay, lr = self.plan.weight_decay, self.plan.lr
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2 and id(p) not in slow], "weight_decay": decay, "share": 1.0},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0, "share": 1.0},
            {"params": list(self.slow), "weight_decay": 0.0, "share": self.plan.slow_share},
        ]
        is_cuda = self.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.98), fused=is_cuda
        )
        self._started = time.monotonic()

    def run(self) -> None:
        self._resume()
        self._started = checked = evaluated = time.monotonic()
        for batch in loader(self.batches, self.plan.num_workers):
            if self._progress() >= 1.0:
                break
            loss, accuracy = self._train(batch)
            if self.step % self.plan.check_every == 0:
                self._pass_stage(batch, float(loss))
            if self.step % self.plan.log_every == 0:
                self._note(batch, float(loss), float(accuracy))
            now = time.monotonic()
            if now - checked > self.plan.checkpoint_every_s:
                checked = now
                self._checkpoint()
            if self.evaluate and now - evaluated > self.evaluate_every_s:
                evaluated = now
                self._log({"event": "scores", "step": self.step, **self.evaluate()})
        self._checkpoint()
        self._log({"event": "end", "step": self.step, "tokens": self.tokens, "seconds": round(self._seconds(), 1)})

    def _train(self, batch: Batch) -> tuple[Tensor, Tensor]:
        lr = self.plan.lr * self._lr_share()
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["share"]
        ids = batch.input_ids.to(self.device, non_blocking=True)
        answer_at = batch.answer_at.to(self.device, non_blocking=True)
        targets = ids.flatten()[answer_at]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.logits_of(ids, answer_at - 1).float()  # the position before writes it
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.input_ids.numel()
        return loss.detach(), (logits.detach().argmax(-1) == targets).float().mean()

    def _pass_stage(self, batch: Batch, loss: float) -> None:
        """To the next stage where this batch shows that its bucket is learned, or where the time for it is over."""
        stage, last = self.batches.stage, self.plan.last_stage
        is_learned = batch.bucket == stage and loss < BUCKETS[stage].passing_loss
        is_late = stage < self._progress() / self.plan.stages_share * last - 1
        if stage < last and (is_learned or is_late):
            self.batches.stage += 1

    def _note(self, batch: Batch, loss: float, accuracy: float) -> None:
        self._log(
            {
                "step": self.step,
                "seconds": round(self._seconds(), 1),
                "tokens": self.tokens,
                "lr": self._optimizer.param_groups[0]["lr"],
                "stage": self.batches.stage,
                "context_tokens": BUCKETS[batch.bucket].context_tokens,
                "loss": round(loss, 4),
                "token_accuracy": round(accuracy, 4),
            }
        )

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self._started

    def _progress(self) -> float:
        return max(self.step / self.plan.steps, self._seconds() / self.plan.max_seconds)

    def _lr_share(self) -> float:
        falling = min(1.0, (1.0 - self._progress()) / self.plan.decay_share)
        return max(0.0, min(falling, (self.step + 1) / self.plan.warmup_steps))

    def _log(self, entry: dict[str, Any]) -> None:
        with (self.directory / "training_log.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")

    def _checkpoint(self) -> None:
        self.save()
        state = {
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self._seconds(),
            "stage": self.batches.stage,
        }
        partial = self.directory / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.directory / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.seconds_before = state["step"], state["tokens"], state["seconds"]
        self.batches.reseed(self.step)
        self.batches.stage = state["stage"]
