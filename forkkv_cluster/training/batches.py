"""Batches: a row is one context with its branches packed behind each other, so that the context runs once for all of them.

Branches of a row stand at the same positions, behind the context, and do not see each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forkkv_cluster.training.examples import BranchExample, ContextExamples

_LENGTHS_ALIKE = 16
"""Batches whose contexts are sorted by length among each other, against padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B rows of C context and T own tokens, padded at the end.

    context, own, positions, targets  [B, C] and [B, T] int64; ``targets`` is the token that follows an own one in its branch
    mask     [B, T, C + T] bool: what an own token sees of context and own tokens
    weights  [B, T] fp32: what the prediction of that token counts in the loss, 0 at padding
    is_completion  [B, T] bool: whether that token is of the completion
    branch   [B, T] int64: number of the branch in its row, -1 at padding
    """

    context: Tensor
    own: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor
    weights: Tensor
    is_completion: Tensor
    branch: Tensor

    @property
    def num_tokens(self) -> int:
        """Of contexts and branches, padding included."""
        return self.context.numel() + self.own.numel()


def plan_rows(contexts: Sequence[ContextExamples], branches_per_context: int) -> list[ContextExamples]:
    """Rows of at most so many branches; a context of more comes in several."""
    return [
        ContextExamples(context.context, context.branches[start : start + branches_per_context])
        for context in contexts
        for start in range(0, len(context.branches), branches_per_context)
    ]


def shuffled(rows: Sequence[ContextExamples], rows_per_batch: int, rng: random.Random) -> Iterator[list[ContextExamples]]:
    """One epoch: batches of rows in random order, of contexts about as long as each other."""
    order = list(rows)
    rng.shuffle(order)
    window = rows_per_batch * _LENGTHS_ALIKE
    batches = []
    for start in range(0, len(order), window):
        alike = sorted(order[start : start + window], key=lambda row: len(row.context))
        batches += [alike[i : i + rows_per_batch] for i in range(0, len(alike), rows_per_batch)]
    rng.shuffle(batches)
    yield from batches


def make_batch(rows: Sequence[ContextExamples], prompt_weight: float, device: torch.device) -> Batch:
    """``prompt_weight`` is what a token of a prompt counts beside one of a completion, which counts 1."""
    packed = [_Packed(row, prompt_weight) for row in rows]
    context_lens = torch.tensor([len(row.context) for row in rows])
    context = _padded([row.context for row in rows], 0)
    branch = _padded([row.branch for row in packed], -1)
    is_context = torch.arange(context.shape[1]) < context_lens[:, None]
    sees_own = (branch[:, :, None] == branch[:, None, :]).tril()
    mask = torch.cat((is_context[:, None].expand(-1, branch.shape[1], -1), sees_own), dim=-1)
    return Batch(
        context=context.to(device),
        own=_padded([row.own for row in packed], 0).to(device),
        positions=_padded([row.positions for row in packed], 0).to(device),
        targets=_padded([row.targets for row in packed], 0).to(device),
        mask=mask.to(device),
        weights=_padded([row.weights for row in packed], 0.0).to(device),
        is_completion=_padded([row.is_completion for row in packed], False).to(device),
        branch=branch.to(device),
    )


class _Packed:
    """The branches of one row behind each other. The last token of each is predicted, and not run."""

    def __init__(self, row: ContextExamples, prompt_weight: float) -> None:
        self.own: list[int] = []
        self.targets: list[int] = []
        self.positions: list[int] = []
        self.weights: list[float] = []
        self.is_completion: list[bool] = []
        self.branch: list[int] = []
        for number, example in enumerate(row.branches):
            self._add(number, example, len(row.context), prompt_weight)

    def _add(self, number: int, example: BranchExample, start: int, prompt_weight: float) -> None:
        tokens = example.tokens
        num_run, num_prompt = len(tokens) - 1, len(example.prompt) - 1
        self.own += tokens[:-1]
        self.targets += tokens[1:]
        self.positions += range(start, start + num_run)
        self.weights += [prompt_weight] * num_prompt + [1.0] * (num_run - num_prompt)
        self.is_completion += [False] * num_prompt + [True] * (num_run - num_prompt)
        self.branch += [number] * num_run


def _padded(rows: Sequence[Sequence[float]], value: float) -> Tensor:
    """[B, longest]."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
