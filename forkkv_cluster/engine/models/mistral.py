"""Mistral: Llama without any bias, and in its first version with a sliding window on every layer."""

from __future__ import annotations

from forkkv_cluster.engine.models.family import Family, RawConfig


def _sliding_window(config: RawConfig, num_layers: int) -> int | None:
    """Later versions say null; 4096 is what Transformers takes a missing one for."""
    window: int | None = config.get("sliding_window", 4096)
    return window


MISTRAL = Family("MistralForCausalLM", sliding_window=_sliding_window)
