"""The training loop: an adapter learns under the sharing that it will be served with."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forkkv_cluster.core.errors import FailedPrecondition, InvalidArgument
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.batches import Batch, make_batch, plan_rows, shuffled
from forkkv_cluster.training.examples import ContextExamples
from forkkv_cluster.training.lora_model import STUDENT, TEACHER, LoraModel
from forkkv_cluster.training.losses import distillation_loss, label_loss
from forkkv_cluster.training.shared_forward import SharedForward

OnStep = Callable[[int, int, float], None]
"""(steps done, steps in all, loss of the last one)."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train.

    sharing               what the adapter will be served under
    epochs, max_steps     passes over the data, and optimizer steps at most (None: no bound)
    learning_rate         of AdamW, after a linear rise over ``warmup_share`` of the steps, then down to 0 as a cosine
    contexts_per_step     contexts that one step runs, each with up to ``branches_per_context`` of its branches
    prompt_weight         what predicting a prompt's token counts beside one of a completion, which counts 1
    max_grad_norm         to which the gradient is cut
    """

    sharing: Sharing = Sharing.EAGER
    epochs: int = 3
    max_steps: int | None = None
    learning_rate: float = 3e-4
    warmup_share: float = 0.05
    contexts_per_step: int = 4
    branches_per_context: int = 8
    prompt_weight: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def validate(self) -> None:
        """Raise InvalidArgument for the first setting that cannot be."""
        for name in ("epochs", "max_steps", "contexts_per_step", "branches_per_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(name, value, "must be at least 1", "Raise it.")
        checks = (
            ("learning_rate", self.learning_rate > 0, "must be above 0"),
            ("warmup_share", 0 <= self.warmup_share < 1, "must be from 0 to below 1"),
            ("prompt_weight", 0 <= self.prompt_weight <= 1, "must be from 0 to 1"),
            ("weight_decay", self.weight_decay >= 0, "must not be negative"),
            ("max_grad_norm", self.max_grad_norm > 0, "must be above 0"),
            ("sharing", self.sharing is not Sharing.AUTO, "is a choice among sharings, none that one could train for"),
        )
        for name, is_valid, problem in checks:
            if not is_valid:
                raise InvalidArgument(name, getattr(self, name), problem, "Change it.")


@dataclass(frozen=True, slots=True)
class Quality:
    """Of an adapter under a sharing, its own completions given (teacher-forced).

    cross_entropy  of a completion's token, in nats
    token_accuracy share of those tokens that greedy decoding picks
    exact_share    share of completions that greedy decoding writes in full
    """

    num_completions: int
    num_tokens: int
    cross_entropy: float
    token_accuracy: float
    exact_share: float


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """``losses`` by step: of labels, or against the teacher where there is one. Tokens include padding."""

    losses: tuple[float, ...]
    num_tokens: int
    seconds: float


class Trainer:
    """Trains the student of ``model``: on completions, or, where there is a teacher, on what it answers when ``isolated``."""

    def __init__(self, model: LoraModel, settings: TrainingSettings) -> None:
        """Raises InvalidArgument as ``TrainingSettings.validate``."""
        settings.validate()
        self._model, self._settings = model, settings
        self._forward = SharedForward(model.causal_lm, model.config)

    def train(self, examples: Sequence[ContextExamples], on_step: OnStep | None = None) -> TrainingResult:
        """Every branch needs a completion. Raises FailedPrecondition when the loss is no number any more."""
        settings, rng = self._settings, random.Random(self._settings.seed)
        rows = plan_rows(examples, settings.branches_per_context)
        num_steps = settings.epochs * math.ceil(len(rows) / settings.contexts_per_step)
        num_steps = min(num_steps, settings.max_steps or num_steps)
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._learning_rate_at(step, num_steps))
        losses: list[float] = []
        num_tokens, started = 0, time.perf_counter()
        self._model.peft_model.train()
        with torch.random.fork_rng(devices=[self._model.device] if self._model.device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            while len(losses) < num_steps:
                for batch_rows in shuffled(rows, settings.contexts_per_step, rng):
                    batch = make_batch(batch_rows, settings.prompt_weight, self._model.device)
                    losses.append(self._step(batch, optimizer, len(losses)))
                    schedule.step()
                    num_tokens += batch.num_tokens
                    if on_step is not None:
                        on_step(len(losses), num_steps, losses[-1])
                    if len(losses) == num_steps:
                        break
        self._model.peft_model.eval()
        return TrainingResult(tuple(losses), num_tokens, time.perf_counter() - started)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[ContextExamples], sharing: Sharing | None = None, adapter: str = STUDENT) -> Quality:
        """Of ``adapter`` under ``sharing``, None for the one that is trained for."""
        rows = plan_rows(examples, self._settings.branches_per_context)
        num_completions = num_exact = num_right = num_tokens = 0
        loss = 0.0
        self._model.peft_model.eval()
        for start in range(0, len(rows), self._settings.contexts_per_step):
            batch = make_batch(rows[start : start + self._settings.contexts_per_step], 0.0, self._model.device)
            logits = self._predict(batch, batch.is_completion, adapter, sharing or self._settings.sharing)
            targets = batch.targets[batch.is_completion]
            is_wrong = logits.argmax(dim=-1) != targets
            branch = _numbered(batch)[batch.is_completion]
            num_completions += len(torch.unique(branch))
            num_exact += len(torch.unique(branch)) - len(torch.unique(branch[is_wrong]))
            num_tokens += len(targets)
            num_right += len(targets) - int(is_wrong.sum())
            loss += float(label_loss(logits, targets, torch.ones_like(targets))) * len(targets)
        return Quality(num_completions, num_tokens, loss / num_tokens, num_right / num_tokens, num_exact / num_completions)

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer, step: int) -> float:
        counts = batch.weights > 0
        loss = self._loss(batch, counts)
        value = loss.item()
        if not math.isfinite(value):
            raise FailedPrecondition(f"the loss of step {step + 1} is {value}. Lower the learning rate.")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.max_grad_norm)
        optimizer.step()
        return value

    def _loss(self, batch: Batch, counts: Tensor) -> Tensor:
        weights = batch.weights[counts]
        if not self._model.has_teacher:
            return label_loss(self._predict(batch, counts, STUDENT, self._settings.sharing), batch.targets[counts], weights)
        with torch.no_grad():
            wanted = self._predict(batch, counts, TEACHER, Sharing.ISOLATED)
        return distillation_loss(self._predict(batch, counts, STUDENT, self._settings.sharing), wanted, weights)

    def _predict(self, batch: Batch, where: Tensor, adapter: str, sharing: Sharing) -> Tensor:
        """Logits [n, V] at the own tokens of ``where`` [B, T] bool."""
        context = self._forward.context(batch.context, adapter, sharing)
        hidden = self._forward.branches(context, batch.own, batch.positions, batch.mask, adapter)
        return self._forward.logits(hidden[where])

    def _learning_rate_at(self, step: int, num_steps: int) -> float:
        """Of 1."""
        num_warmup = math.ceil(self._settings.warmup_share * num_steps)
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def _numbered(batch: Batch) -> Tensor:
    """[B, T] int64: a number for each branch of the batch, another one in every row."""
    rows = torch.arange(len(batch.branch), device=batch.branch.device)[:, None]
    return rows * (int(batch.branch.max()) + 1) + batch.branch
