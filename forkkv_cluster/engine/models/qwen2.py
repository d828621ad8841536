"""Qwen2 and Qwen2.5: biases on q, k and v alone, and a sliding window that most checkpoints name and few switch on."""

from __future__ import annotations

from forkkv_cluster.engine.models.family import Biases, Family, RawConfig


def window_if_switched_on(config: RawConfig, num_layers: int) -> int | None:
    """Of the layers that ``layer_types`` names, else of those from ``max_window_layers`` on; the defaults are Transformers'."""
    if not config.get("use_sliding_window", False):
        return None
    layer_types = config.get("layer_types")
    is_used = config.get("max_window_layers", 28) < num_layers if layer_types is None else "sliding_attention" in layer_types
    return config.get("sliding_window", 4096) if is_used else None


def _biases(config: RawConfig) -> Biases:
    return Biases(qkv=True, o=False)


QWEN2 = Family("Qwen2ForCausalLM", biases=_biases, sliding_window=window_if_switched_on)
