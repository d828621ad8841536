"""Completions of the teacher, where the data has none: what it answers ``isolated``, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.training.examples import BranchExample, ContextExamples
from forkkv_cluster.training.lora_model import STUDENT, TEACHER, LoraModel, select

OnCompleted = Callable[[int, int], None]
"""(completions written, completions to write)."""


def complete(
    model: LoraModel,
    examples: Sequence[ContextExamples],
    *,
    max_tokens: int,
    prompts_per_batch: int = 16,
    on_completed: OnCompleted | None = None,
) -> list[ContextExamples]:
    """``examples`` with a completion of at most ``max_tokens`` where one was missing; ends count as tokens of it.

    Raises InvalidArgument for a prompt that leaves no room for one token.
    """
    missing = [(context, branch) for context in examples for branch in context.branches if not branch.completion]
    # Of like length together, against padding.
    missing.sort(key=lambda pair: len(pair[0].context) + len(pair[1].prompt))
    written: dict[int, tuple[int, ...]] = {}
    select(model, TEACHER)
    try:
        for start in range(0, len(missing), prompts_per_batch):
            part = missing[start : start + prompts_per_batch]
            prompts = [context.context + branch.prompt for context, branch in part]
            for (_, branch), tokens in zip(part, _greedy(model, prompts, max_tokens), strict=True):
                written[id(branch)] = tokens
            if on_completed is not None:
                on_completed(len(written), len(missing))
    finally:
        select(model, STUDENT)
    return [
        replace(context, branches=tuple(BranchExample(b.prompt, written.get(id(b), b.completion)) for b in context.branches))
        for context in examples
    ]


@torch.no_grad()
def _greedy(model: LoraModel, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[tuple[int, ...]]:
    longest = max(len(prompt) for prompt in prompts)
    room = min(max_tokens, model.max_len - longest)
    if room < 1:
        problem = f"leaves no room for a completion: the model takes {model.max_len}"
        raise InvalidArgument("prompt", f"{longest} tokens", problem, "Shorten the context.")
    ends = model.config.eos_token_ids
    padding = ends[0] if ends else 0
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    lens = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = torch.arange(longest, device=model.device) >= longest - lens[:, None]
    greedy = {"max_new_tokens": room, "do_sample": False, "eos_token_id": list(ends) or None, "pad_token_id": padding}
    out = model.peft_model.eval().generate(input_ids=ids, attention_mask=mask.long(), **greedy)
    return [_up_to_end(row, ends) for row in out[:, longest:].tolist()]


def _up_to_end(tokens: list[int], ends: Sequence[int]) -> tuple[int, ...]:
    """What comes after the first end is padding."""
    end = next((position for position, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tuple(tokens[: end + 1])
