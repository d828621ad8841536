"""Decode steps in tables that many steps share, captured where there is a GPU: LoRA is computed beside the linears, into memory
that serves all layers. Held against steps in tables of their own, where it is added in place, and against the CPU's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from forkkv_cluster.engine.gpu import device_step
from tests.engine.families import llama, save
from tests.engine.model_engine import ModelEngine, assert_same_outputs
from tests.engine.test_adapter_variants import ALL, make

CONTEXT = [(7 * i * i + 3) % 300 for i in range(40)]
OWN = [(11 * i + 5) % 300 for i in range(9)]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ALL, "lora_alpha": 8},
    "one-layer": {"target_modules": ALL, "layers_to_transform": [1], "r": 4, "lora_alpha": 8},
    "other-modules-by-layer": {"target_modules": r".*layers\.(0\..*(q|down)_proj|2\..*(v|o|up)_proj)", "lora_alpha": 8},
}
"""What one layer wrote for a row must not be added in a layer that adds nothing to it."""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sharing", ["isolated", "eager"])
def test_adapters_beside_the_linears_answer_as_in_place(
    device: str, sharing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents end one after the other, so that rows of the same tables pass to other adapters, and to none."""
    torch.manual_seed(0)
    model_dir = save(llama(num_hidden_layers=3, head_dim=16), tmp_path / "model")
    adapters = {name: make(model_dir, tmp_path / name, options) for name, options in ADAPTERS.items()}
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
