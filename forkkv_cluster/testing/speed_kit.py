"""The speed kit: the 82M-parameter Llama shape of the offline benchmark and its adapters, all with *random* weights.

Real files, written by transformers and peft, so that any engine can be given the same ones.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from forkkv_cluster.testing.tiny_models import quiet_hub, sort_targets


@dataclass(frozen=True, slots=True)
class SpeedSpec:
    """82M parameters, embeddings tied, bf16. Adapters of ``lora_rank`` on ``targets``."""

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int = 4
    head_dim: int = 64
    vocab_size: int = 8192
    max_position: int = 16384
    lora_rank: int = 16
    num_adapters: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class SpeedKit:
    """Directories of a built kit; ``adapter_dirs`` by adapter name."""

    model_dir: Path
    adapter_dirs: Mapping[str, Path]


def build_speed_kit(directory: str | Path, spec: SpeedSpec | None = None) -> SpeedKit:
    """Write the kit into ``directory``, or use the complete one of the same shape that is there.

    Raises FileExistsError when the directory holds anything else.
    """
    target, spec = Path(directory), spec or SpeedSpec()
    manifest = json.dumps(asdict(spec), sort_keys=True)
    names = [f"agent-{index}" for index in range(spec.num_adapters)]
    kit = SpeedKit(target / "model", {name: target / name for name in names})
    done = target / "kit.json"
    if done.exists() and done.read_text() == manifest:
        return kit
    if target.exists():
        raise FileExistsError(f"{target} exists and is not this speed kit. Remove it, or name another directory.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(staging, names, spec)
        (staging / "kit.json").write_text(manifest)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return kit


def _write(root: Path, names: list[str], spec: SpeedSpec) -> None:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(0)
        model = _model(spec)
        model.save_pretrained(str(root / "model"))
        for name in names:
            config = LoraConfig(
                r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules=list(spec.targets), init_lora_weights=False,
                task_type="CAUSAL_LM",
            )  # fmt: skip
            adapted = get_peft_model(model, config)
            adapted.save_pretrained(str(root / name), save_embedding_layers=False)
            adapted.unload()
            sort_targets(root / name / "adapter_config.json")


def _model(spec: SpeedSpec) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.name_or_path = "speed-kit"  # what peft writes as the adapter's base model
    return model.eval()
