"""What repairing a share of a context's tokens would buy back: they are run again under the agent's own adapter.

Which tokens: those that a measure, cheap beside the agent's whole pass, puts first.

    attention  how much of its attention the prompt spends on the token, over the context as shared; costs the prompt alone
    deviation  how far K and V are from the agent's own where both differ first, in the second layer; costs one layer's pass
    last       the end of the context
    random     as a floor: any measure must beat it
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.batches import Batch, make_batch, plan_rows
from forkkv_cluster.training.examples import BranchExample, ContextExamples
from forkkv_cluster.training.lora_model import STUDENT, LoraModel
from forkkv_cluster.training.losses import distillation_loss
from forkkv_cluster.training.shared_forward import KV, SharedForward

Measure = Literal["attention", "deviation", "last", "random"]
MEASURES: tuple[Measure, ...] = ("attention", "deviation", "last", "random")


@dataclass(frozen=True, slots=True)
class RepairPoint:
    """One share of one measure, over the tokens of all completions (teacher-forced).

    agreement       share whose most likely token is that of ``isolated``
    token_accuracy  share whose most likely token is the completion's
    kl              mean KL(isolated | repaired), in nats
    """

    measure: Measure
    share: float
    agreement: float
    token_accuracy: float
    kl: float


class RepairSweep:
    """The student of ``model`` under ``sharing``, repaired. ``branches`` of a context choose its tokens together, in blocks of
    ``block_size``: a page is the least that an engine can give an agent for itself."""

    def __init__(
        self, model: LoraModel, sharing: Sharing = Sharing.EAGER, branches: int = 1, block_size: int = 1, seed: int = 0
    ) -> None:
        self._model, self._sharing, self._branches, self._seed = model, sharing, branches, seed
        self._block_size = block_size
        self._forward = SharedForward(model.causal_lm, model.config)

    @torch.no_grad()
    def run(
        self,
        examples: Sequence[ContextExamples],
        shares: Sequence[float],
        measures: Sequence[Measure] = MEASURES,
        on_row: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[RepairPoint]:
        """One point for each measure and share (0 to 1), in their order; every branch needs a completion."""
        self._model.peft_model.eval()
        rows = plan_rows(examples, self._branches)
        sums: dict[tuple[Measure, float], Tensor] = {(m, s): torch.zeros(3) for m in measures for s in shares}
        num_tokens = 0
        for number, row in enumerate(rows):
            num_tokens += self._add_row(number, row, sums)
            on_row(number + 1, len(rows))
        return [RepairPoint(*key, *(value / num_tokens).tolist()) for key, value in sums.items()]

    def _add_row(self, number: int, row: ContextExamples, sums: dict[tuple[Measure, float], Tensor]) -> int:
        """Adds the row's tokens to all sums of (agreement, accuracy, KL); how many there are."""
        batch = make_batch([row], 0.0, self._model.device)
        shared = self._forward.context(batch.context, STUDENT, self._sharing)
        alone = self._forward.context(batch.context, STUDENT, Sharing.ISOLATED)
        wanted, targets = self._logits(alone, batch), batch.targets[batch.is_completion]
        orders: dict[Measure, list[Tensor]] = {}
        for (measure, share), total in sums.items():
            if measure not in orders:
                orders[measure] = _blocks_by(self._scores(measure, number, row, shared, alone), self._block_size)
            first = orders[measure][: round(share * len(orders[measure]))]
            chosen = torch.cat(first).sort().values if first else batch.context.new_zeros(0)
            found = self._logits(self._forward.repaired(shared, batch.context, chosen, STUDENT), batch)
            best = found.argmax(dim=-1)
            kl = distillation_loss(found, wanted, torch.ones_like(targets)) * len(targets)
            total += torch.stack(((best == wanted.argmax(dim=-1)).sum(), (best == targets).sum(), kl)).cpu()
        return len(targets)

    def _logits(self, context: Sequence[KV], batch: Batch) -> Tensor:
        hidden = self._forward.branches(context, batch.own, batch.positions, batch.mask, STUDENT)
        return self._forward.logits(hidden[batch.is_completion])

    def _scores(self, measure: Measure, number: int, row: ContextExamples, shared: Sequence[KV], alone: Sequence[KV]) -> Tensor:
        """[C]: the larger, the sooner a token of the context is repaired."""
        num_tokens, device = len(row.context), self._model.device
        if measure == "attention":
            return self._attention(row, shared)
        if measure == "deviation":
            layer = min(1, len(shared) - 1)
            pairs = zip(shared[layer], alone[layer], strict=True)
            k, v = (_shift(ours, theirs) for ours, theirs in pairs)
            return k + v
        if measure == "last":
            return torch.arange(num_tokens, device=device, dtype=torch.float32)
        rng = random.Random(f"{self._seed}/{number}")
        return torch.tensor([rng.random() for _ in range(num_tokens)], device=device)

    def _attention(self, row: ContextExamples, shared: Sequence[KV]) -> Tensor:
        """What the prompts spend on each token, over all layers and heads. Their completions are not known yet."""
        prompts = tuple(BranchExample(branch.prompt, branch.prompt[-1:]) for branch in row.branches)
        batch = make_batch([replace(row, branches=prompts)], 0.0, self._model.device)
        spent = torch.zeros(len(row.context), device=self._model.device)

        def attend(q: Tensor, kv: KV, mask: Tensor | None) -> Tensor:
            assert mask is not None
            group = q.shape[1] // kv.k.shape[1]
            k, v = (tensor.repeat_interleave(group, dim=1) for tensor in kv)
            scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(dim=-1)
            spent.add_(weights[..., : len(spent)].sum(dim=(0, 1, 2)))
            return torch.matmul(weights.to(v.dtype), v)

        self._forward.branches(shared, batch.own, batch.positions, batch.mask, STUDENT, attend)
        return spent


def _blocks_by(scores: Tensor, block_size: int) -> list[Tensor]:
    """The positions of each block, those of the largest sum of ``scores`` [C] first."""
    blocks = torch.split(torch.arange(len(scores), device=scores.device), block_size)
    sums = torch.stack([block.sum() for block in torch.split(scores, block_size)])
    return [blocks[index] for index in sums.argsort(descending=True, stable=True).tolist()]


def _shift(ours: Tensor, theirs: Tensor) -> Tensor:
    """[1, Hkv, C, D] -> [C]: squared distance of each token beside the mean square."""
    shift: Tensor = (ours - theirs).float().square().sum(dim=(0, 1, 3)) / theirs.float().square().mean()
    return shift
