"""Held-out accuracy: whether greedy decoding gives the right answer, read off one forward pass.

Greedy decoding writes exactly the true answer where every token of it is the most likely one after those before it, so that
one pass over question and truth tells whether it would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from forkkv_cluster.training.casebook.batches import batch_of
from forkkv_cluster.training.casebook.loop import LogitsOf
from forkkv_cluster.training.casebook.roles import Turn
from forkkv_cluster.training.casebook.samples import Example, Sample, encode_turns, examples
from forkkv_cluster.training.casebook.split import Split
from forkkv_cluster.training.casebook.tokenizer import Encoder

__all__ = ["exact_answers", "held_out_scores"]

_MAX_BATCH_TOKENS = 65_536


@torch.no_grad()
def exact_answers(
    logits_of: LogitsOf, encoder: Encoder, questions: Sequence[Example], device: torch.device, dtype: torch.dtype | None = None
) -> list[bool]:
    """One entry for each example. ``dtype`` autocasts."""
    found: list[bool] = []
    rows = [_sample(encoder, example) for example in questions]
    row_len = max(len(row.context_ids) + len(row.branch_ids) for row in rows)
    per_batch = max(1, _MAX_BATCH_TOKENS // row_len)
    for start in range(0, len(rows), per_batch):
        batch = batch_of(rows[start : start + per_batch], row_len, encoder.pad, 0)
        ids, answer_at = batch.input_ids.to(device), batch.answer_at.to(device)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            best = logits_of(ids, answer_at - 1).argmax(-1)
        is_right = torch.ones(len(ids), dtype=torch.bool, device=device)
        is_right[answer_at[best != ids.flatten()[answer_at]] // row_len] = False
        found += is_right.tolist()
    return found


def _sample(encoder: Encoder, example: Example) -> Sample:
    branch_ids, is_answer = encode_turns(encoder, [Turn(example.question, example.answer)])
    return Sample(encoder.context(example.context), branch_ids, is_answer)


def held_out_scores(
    logits_of: LogitsOf,
    encoder: Encoder,
    roles: Sequence[str],
    lengths: Sequence[int],
    *,
    count: int,
    device: torch.device,
    seed: int = 1,
    split: Split = "held_out",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """role -> context tokens -> share of ``count`` held-out examples that are answered exactly right."""
    return {
        role: {
            str(length): round(
                sum(
                    exact_answers(
                        logits_of,
                        encoder,
                        examples(role, seed=seed, context_tokens=length, count=count, split=split),
                        device,
                        dtype,
                    )
                )
                / count,
                4,
            )
            for length in lengths
        }
        for role in roles
    }
