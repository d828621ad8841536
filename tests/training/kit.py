"""A small random model of a family with an adapter in the trainer, and its logits on one branch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.batches import make_batch
from forkkv_cluster.training.examples import BranchExample, ContextExamples
from forkkv_cluster.training.lora_model import STUDENT, LoraModel, open_model
from forkkv_cluster.training.shared_forward import SharedForward
from tests.engine.families import FAMILIES, save
from tests.engine.test_adapter_variants import ALL, make

SHARINGS = [Sharing.ISOLATED, Sharing.BASE, Sharing.EAGER, Sharing.RESIDUAL]
CONTEXT = [(7 * i * i + 3) % 300 for i in range(43)]
OWN = [(11 * i + 5) % 300 for i in range(9)]


def random_model(directory: Path, family: str = "llama-gqa") -> Path:
    torch.manual_seed(0)
    return save(FAMILIES[family](), directory / "model")


def random_adapter(model_dir: Path, directory: Path, **options: Any) -> Path:
    return make(model_dir, directory, {"r": 8, "lora_alpha": 4, "target_modules": ALL, **options})


def opened(model_dir: Path, adapter_dir: Path, sharing: Sharing = Sharing.EAGER, **options: Any) -> LoraModel:
    """The student is a copy of the adapter."""
    return open_model(model_dir, sharing, teacher_dir=adapter_dir, device="cpu", **options)


def branch_logits(model: LoraModel, sharing: Sharing, context: Sequence[int] = CONTEXT, own: Sequence[int] = OWN) -> Tensor:
    """[len(own), V], at each own token, of the student."""
    row = ContextExamples(tuple(context), (BranchExample(tuple(own), (0,)),))
    return row_logits(model, sharing, [row])[0]


def row_logits(model: LoraModel, sharing: Sharing, rows: Sequence[ContextExamples]) -> list[Tensor]:
    """[tokens that are run, V] of every branch of every row, all in one batch."""
    forward = SharedForward(model.causal_lm, model.config)
    batch = make_batch(rows, 1.0, model.device)
    seen = forward.context(batch.context, STUDENT, sharing)
    logits = forward.logits(forward.branches(seen, batch.own, batch.positions, batch.mask, STUDENT))
    return [
        logits[row][batch.branch[row] == branch]
        for row, examples in enumerate(rows)
        for branch in range(len(examples.branches))
    ]
