"""A small random Qwen3 with adapters that treat k in different ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.families import FAMILIES, save
from tests.engine.test_adapter_variants import make

ADAPTERS: dict[str, dict[str, Any]] = {
    "qkvo": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_alpha": 8},
    "k-alone": {"target_modules": ["q_proj", "k_proj"], "r": 12, "lora_alpha": 12},
    "k-wider-than-v": {"target_modules": ["k_proj", "v_proj"], "r": 5, "rank_pattern": {"k_proj": 11}, "lora_alpha": 20},
    "k-in-one-layer": {"target_modules": r".*(layers\.1\.self_attn\.k_proj|v_proj|down_proj)", "lora_alpha": 8},
    "biased": {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True, "lora_alpha": 8},
    "qv": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8},
    "qo": {"target_modules": ["q_proj", "o_proj"], "lora_alpha": 8},
}
WITH_K = [name for name in ADAPTERS if name not in ("qv", "qo")]


def build_qwen3_kit(root: Path, family: str = "qwen3") -> TinyKit:
    """Checkpoint and adapters in ``root``; every norm's weight and every bias differs from what it is initialised to."""
    torch.manual_seed(0)
    model_dir = save(FAMILIES[family](), root / "model")
    return TinyKit(root, model_dir, {name: make(model_dir, root / name, options) for name, options in ADAPTERS.items()})
