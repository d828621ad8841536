"""What a branch must answer under each sharing, by transformers and peft themselves, for any family.

The model's own code runs: rotation, norms on K, biases, ties and all. Sharing is nothing but what the k and v projections
of the context give out, before norm and rotation, and forward hooks say that:

    isolated   the adapter's own projections of its own x: one ordinary pass
    base       W x of the base model's x
    eager      W x + the adapter's part, both of the base model's x
    residual   W x of the base model's x + the adapter's part of its own x, computed while it attends to just that sum
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from forkkv_cluster.testing.tiny_models import quiet_hub

Override = Callable[[str, Any, Tensor, Tensor], Tensor]
"""(module's name, module, its input, its output) -> what it gives out instead."""


class FamilyOracle:
    """``adapter_dir`` None is the base model, which answers the same under every sharing."""

    def __init__(self, model_dir: Path, adapter_dir: Path | None) -> None:
        self._has_adapter = adapter_dir is not None
        with quiet_hub():
            self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
            if adapter_dir is not None:
                self._model = PeftModel.from_pretrained(self._model, str(adapter_dir))
        self._model.eval()

    @torch.no_grad()
    def logits(self, context: Sequence[int], own: Sequence[int], sharing: str) -> Tensor:
        """[len(own), V] fp32, at each own token."""
        if sharing == "isolated" or not self._has_adapter:
            return self._model(torch.tensor([[*context, *own]])).logits[0, len(context) :]
        inputs, outputs = self._base_pass(context)
        eager = {name: module(inputs[name]) for name, module in self._projections()} if sharing == "eager" else {}

        def shared(name: str, module: Any, x: Tensor, out: Tensor) -> Tensor:
            if sharing == "eager":
                return eager[name]
            part = out - module.base_layer(x) if sharing == "residual" and hasattr(module, "base_layer") else 0.0
            return outputs[name] + part

        cache = DynamicCache()
        with self._hooked(shared):
            self._model(torch.tensor([list(context)]), past_key_values=cache)
        return self._model(torch.tensor([list(own)]), past_key_values=cache).logits[0]

    def _base_pass(self, context: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs, outputs = {}, {}

        def record(name: str, module: Any, x: Tensor, out: Tensor) -> Tensor:
            inputs[name], outputs[name] = x, out
            return out

        with self._model.disable_adapter(), self._hooked(record):
            self._model(torch.tensor([list(context)]))
        return inputs, outputs

    def _projections(self) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in self._model.named_modules() if n.endswith(("self_attn.k_proj", "self_attn.v_proj"))]

    @contextmanager
    def _hooked(self, override: Override) -> Iterator[None]:
        handles = [
            module.register_forward_hook(lambda m, args, out, name=name: override(name, m, args[0], out))
            for name, module in self._projections()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
