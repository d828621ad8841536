"""A tiny random model with very many adapters: PEFT directories of equal shape, each with random weights of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from forkkv_cluster.testing.tiny_models import ADAPTER_NAMES, build_tiny_kit

FORMAT = "forkkv-adapter-kit/1"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterKit:
    """``adapter_dirs`` in order of their numbers; names are the directories' own."""

    model_dir: Path
    adapter_dirs: tuple[Path, ...]


def build_adapter_kit(directory: str | Path, num_adapters: int) -> AdapterKit:
    """Write the kit into ``directory``, or use the complete one of the same size that is there.

    peft writes the first adapter (rank 8 on q, k, v and o; 116 KiB), the others are its files with other numbers.
    Raises FileExistsError when the directory holds anything else.
    """
    target = Path(directory)
    manifest = json.dumps({"format": FORMAT, "num_adapters": num_adapters})
    done = target / "adapters.json"
    if not (done.exists() and done.read_text() == manifest):
        if target.exists():
            raise FileExistsError(f"{target} exists and is not this adapter kit. Remove it, or name another directory.")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _write(staging, num_adapters)
            (staging / done.name).write_text(manifest)
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    model_dir = build_tiny_kit(target / "tiny", num_adapters=1).model_dir
    return AdapterKit(model_dir, tuple(target / _name(index) for index in range(num_adapters)))


def _name(index: int) -> str:
    return f"adapter-{index:04d}"


def _write(root: Path, num_adapters: int) -> None:
    pattern = build_tiny_kit(root / "tiny", num_adapters=1).adapter_dirs[ADAPTER_NAMES[0]]
    tensors = load_file(pattern / _WEIGHTS)
    for index in range(num_adapters):
        generator = torch.Generator().manual_seed(index)
        noise = {
            name: torch.randn(tensor.shape, generator=generator) * tensor.std() for name, tensor in sorted(tensors.items())
        }
        directory = root / _name(index)
        directory.mkdir()
        shutil.copyfile(pattern / _CONFIG, directory / _CONFIG)
        save_file(noise, directory / _WEIGHTS, metadata={"format": "pt"})
