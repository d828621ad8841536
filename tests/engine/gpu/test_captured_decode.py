"""Decode steps in tables that many steps share, captured where there is a GPU: LoRA is computed beside the linears, into memory
that serves all layers. Held against steps in tables of their own, where it is added in place, and against the CPU's path."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forkkv_cluster.engine.gpu import device_step
from tests.engine.families import llama, save
from tests.engine.model_engine import ModelEngine, assert_same_outputs

CONTEXT = [(7 * i * i + 3) % 300 for i in range(40)]
OWN = [(11 * i + 5) % 300 for i in range(9)]
HIDDEN, INTERMEDIATE, HEAD_DIM = 32, 48, 16
SIZES = {"q_proj": (HIDDEN, 4 * HEAD_DIM), "k_proj": (HIDDEN, 2 * HEAD_DIM), "v_proj": (HIDDEN, 2 * HEAD_DIM)}
SIZES |= {"o_proj": (4 * HEAD_DIM, HIDDEN), "gate_proj": (HIDDEN, INTERMEDIATE), "up_proj": (HIDDEN, INTERMEDIATE)}
SIZES |= {"down_proj": (INTERMEDIATE, HIDDEN)}
TARGETS = {"all": r".*", "one-layer": r"1\..*", "other-modules-by-layer": r"0\.(q|down)_proj|2\.(v|o|up)_proj"}
"""Layer and module. What one layer wrote for a row must not be added in a layer that adds nothing to it."""


def write_adapter(directory: Path, targets: str) -> Path:
    tensors = {}
    for layer in range(3):
        for module, (size_in, size_out) in SIZES.items():
            if re.fullmatch(targets, f"{layer}.{module}"):
                name = f"base_model.model.model.layers.{layer}.{'self_attn' if module[0] in 'qkvo' else 'mlp'}.{module}"
                tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (
                    torch.randn(8, size_in),
                    torch.randn(size_out, 8),
                )
    directory.mkdir()
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 0.5, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sharing", ["isolated", "eager"])
def test_adapters_beside_the_linears_answer_as_in_place(
    device: str, sharing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents end one after the other, so that rows of the same tables pass to other adapters, and to none."""
    torch.manual_seed(0)
    model_dir = save(llama(num_hidden_layers=3, head_dim=HEAD_DIM), tmp_path / "model")
    adapters = {name: write_adapter(tmp_path / name, targets) for name, targets in TARGETS.items()}
    agents = ("one-layer", None, "all", "other-modules-by-layer", None, "all")
    ways = (("cpu", False, device_step.MAX_DECODE_ROWS), (device, True, device_step.MAX_DECODE_ROWS), (device, True, 0))
    runs = []
    for place, has_tables, max_rows in ways:
        monkeypatch.setattr(device_step, "MAX_DECODE_ROWS", max_rows)
        engine = ModelEngine(model_dir, adapters, device=place, has_tables=has_tables)
        asked = [engine.ask(CONTEXT, OWN, agent, sharing, 4 + 3 * number) for number, agent in enumerate(agents)]
        runs.append((engine, engine.run_all(asked)))
    (wanted, wanted_ids), *others = runs
    for engine, ids in others:
        for one, other in zip(wanted_ids, ids, strict=True):
            assert_same_outputs(wanted, one, engine, other)
    assert len({tuple(wanted.outputs[request_id][:4]) for request_id in wanted_ids}) >= 4
