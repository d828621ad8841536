"""A small random model and adapters that differ in what sharing loses on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from forkkv_cluster.core.config import ClusterConfig, parse_config
from forkkv_cluster.testing.tiny_models import TinyModelSpec, build_tiny_kit, quiet_hub, sort_targets

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
SPEC = TinyModelSpec(
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=512,
    max_position=1024,
)


@dataclass(frozen=True)
class FidelityKit:
    """``adapters`` by name.

    strong   re-encodes: random q, k, v, o of full strength in every layer
    middle   the same at a fifth: agrees on contexts of a few tokens, and not on long ones
    weak     the same at a five-hundredth: changes next to nothing
    late     o of the last layer alone: no K and no V that anybody attends to depends on it
    """

    model_dir: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)

    def config(self, **sections: Any) -> ClusterConfig:
        """float32, pages of 16 tokens, contexts of 96, nothing measured unasked; ``sections`` over that."""
        return parse_config(
            {
                "model": {"path": str(self.model_dir), "dtype": "float32"},
                "cache": {"kv_bytes": "32MiB", "page_size": 16},
                "defaults": {"adapter_sharing": "isolated"},
                **sections,
                "calibration": {"context_tokens": 96, **sections.get("calibration", {})},
            }
        )


def build_fidelity_kit(directory: Path) -> FidelityKit:
    model_dir = build_tiny_kit(directory / "kit", num_adapters=0, spec=SPEC).model_dir
    adapters = {
        "strong": save_adapter(model_dir, directory / "strong", 1.0),
        "middle": save_adapter(model_dir, directory / "middle", 0.2),
        "weak": save_adapter(model_dir, directory / "weak", 0.002),
        "late": save_adapter(model_dir, directory / "late", 1.0, ["o_proj"], layers=[1]),
    }
    return FidelityKit(model_dir, adapters)


def save_adapter(
    model_dir: Path, directory: Path, strength: float, targets: Sequence[str] = QKVO, *, layers: list[int] | None = None
) -> Path:
    """Write a random adapter of rank 8 with peft; ``strength`` multiplies its B."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32, local_files_only=True)
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=list(targets),
            layers_to_transform=layers,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(strength)
        adapted.save_pretrained(str(directory), save_embedding_layers=False)
    sort_targets(directory / "adapter_config.json")
    return directory
