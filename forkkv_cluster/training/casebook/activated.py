"""aLoRA over rows of several turns: active from each turn's invocation to the end of its answer, the questions the base's.

peft invokes an aLoRA once in a row, at its last invocation, and searches the row's tokens on every pass; rows of one turn are
supervised by one answer for a whole context. Of a row with one turn, what is computed here is what peft computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forkkv_cluster.training.casebook.loop import LogitsOf, answer_logits

__all__ = ["active_positions", "turn_logits"]


def active_positions(input_ids: Tensor, invocation: list[int], eos: int) -> Tensor:
    """input_ids [n, m] -> bool [n, m]: from where ``invocation`` begins up to the next ``eos``, which is active too."""
    starts = input_ids == invocation[0]
    for offset, token in enumerate(invocation[1:], start=1):
        starts[:, :-offset] &= input_ids[:, offset:] == token
        starts[:, -offset:] = False
    at = torch.arange(input_ids.shape[1], device=input_ids.device)
    started = torch.where(starts, at, -1).cummax(dim=1).values
    ended = torch.where(input_ids == eos, at, -1).cummax(dim=1).values.roll(1, dims=1)
    ended[:, 0] = -1
    return started > ended


def turn_logits(model: Any, invocation: list[int], eos: int) -> LogitsOf:
    """Of a PeftModel with one aLoRA, in place of peft's own pass."""
    active: list[Tensor] = []
    for module in model.modules():
        for name in getattr(module, "lora_variant", {}):
            module.lora_variant[name] = _Masked(active)
    logits_of = answer_logits(model.get_base_model())

    def masked(input_ids: Tensor, at: Tensor) -> Tensor:
        active[:] = [active_positions(input_ids, invocation, eos).unsqueeze(-1)]
        return logits_of(input_ids, at)

    return masked


class _Masked:
    """What a LoRA layer of peft asks a variant for, in training."""

    def __init__(self, active: list[Tensor]) -> None:
        self._active = active

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        adapted: Tensor = result + b(a(x.to(a.weight.dtype))) * (module.scaling[active_adapter] * self._active[0])
        return adapted
