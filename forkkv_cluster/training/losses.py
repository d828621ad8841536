"""What is minimised, over the predictions of a batch that count."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


def label_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of -log p(target): logits [n, V], targets [n] int64, weights [n] -> scalar, in nats."""
    return (cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


def distillation_loss(logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of KL(teacher | student): logits and teacher_logits [n, V], weights [n] -> scalar, in nats."""
    student, teacher = logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
    return (kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1) * weights).sum() / weights.sum()
