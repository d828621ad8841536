"""Qwen3: q and k are normalised over each head, heads of 128 elements whatever the hidden size; its window is Qwen2's."""

from __future__ import annotations

from forkkv_cluster.engine.models.family import Family, biases_as_configured
from forkkv_cluster.engine.models.qwen2 import window_if_switched_on

QWEN3 = Family(
    "Qwen3ForCausalLM",
    biases=biases_as_configured,
    sliding_window=window_if_switched_on,
    has_qk_norm=True,
    default_head_dim=128,
)
