"""Two oracles that share no code say the same: formulas on plain tensors, and hooks in transformers and peft."""

from __future__ import annotations

import pytest
import torch

from forkkv_cluster.testing.tiny_models import TinyKit
from tests.oracle.family_oracle import FamilyOracle
from tests.oracle.oracle import Oracle

CONTEXT = [(7 * i * i + 3) % 2000 + 10 for i in range(40)]
OWN = [(11 * i + 5) % 2000 + 10 for i in range(9)]


@pytest.mark.parametrize("name", ["critic", "coder", "tester", "scout"])
def test_both_oracles_agree_under_every_sharing(tiny_kit: TinyKit, name: str) -> None:
    formulas = Oracle(tiny_kit.model_dir)
    adapter = formulas.adapter(tiny_kit.adapter_dirs[name])
    hooks = FamilyOracle(tiny_kit.model_dir, tiny_kit.adapter_dirs[name])
    for sharing in ("isolated", "base", "eager", "residual"):
        expected = formulas.logits(CONTEXT, OWN, adapter, sharing)
        torch.testing.assert_close(hooks.logits(CONTEXT, OWN, sharing), expected, atol=5e-5, rtol=0)
