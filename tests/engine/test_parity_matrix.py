"""Every family under every sharing, through the whole engine: whole prompts, chunks, decode, preemption, resume.

``isolated`` is held against transformers and peft, the other modes against the independent oracle, whose code is the
family's own in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model

from forkkv_cluster.testing.tiny_models import quiet_hub
from tests.engine.families import FAMILIES, save
from tests.engine.model_engine import ModelEngine
from tests.oracle.family_oracle import FamilyOracle

MATRIX = ("llama-gqa", "llama3-rope", "mistral", "qwen2-mha-tied", "qwen3")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {"all": [*ATTENTION, "gate_proj", "up_proj", "down_proj"], "qkv": ATTENTION[:3], "qv": ["q_proj", "v_proj"]}
SCHEDULES: dict[str, dict[str, int]] = {
    "whole-prompts": {"page_size": 16, "max_num_batched_tokens": 512},
    "chunks": {"page_size": 16, "max_num_batched_tokens": 7},
    "small-pages": {"page_size": 4, "max_num_batched_tokens": 64},
}
CONTEXT = [(7 * i * i + 3) % 300 for i in range(45)]  # ends inside a page
OWN = [(11 * i + 5) % 300 for i in range(9)]


class Kit(NamedTuple):
    name: str
    model_dir: Path
    adapter_dirs: dict[str, Path]
    oracles: dict[str | None, FamilyOracle]

    def agents(self, sharing: str) -> tuple[str | None, ...]:
        """All, but for those that change K where an own pass over normalised K is defined otherwise: test_qwen3_engine."""
        return ("qv", None) if self.name == "qwen3" and sharing == "residual" else (*TARGETS, None)

    def check(self, engine: ModelEngine, request_id: str, own: Sequence[int], agent: str | None, sharing: str) -> None:
        output = engine.outputs[request_id]
        logits = self.oracles[agent].logits(CONTEXT, [*own, *output[:-1]], sharing)
        engine.assert_answers(request_id, logits[len(own) - 1 :])


@pytest.fixture(scope="module", params=MATRIX)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def build(name: str, root: Path) -> Kit:
    torch.manual_seed(0)
    model = FAMILIES[name]()
    adapter_dirs = {adapter: root / adapter for adapter in TARGETS}
    with quiet_hub():
        model_dir = save(model, root / "model")
        for adapter, targets in TARGETS.items():
            config = LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False)
            adapted = get_peft_model(model, config)
            adapted.save_pretrained(str(adapter_dirs[adapter]), save_embedding_layers=False)
            adapted.unload()
    oracles = {name: FamilyOracle(model_dir, path) for name, path in {**adapter_dirs, None: None}.items()}
    return Kit(name, model_dir, adapter_dirs, oracles)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sharing", ["isolated", "base", "eager", "residual"])
def test_a_family_answers_as_its_oracle(kit: Kit, sharing: str, schedule: str) -> None:
    engine = ModelEngine(kit.model_dir, kit.adapter_dirs, **SCHEDULES[schedule])
    ids = engine.run_all([engine.ask(CONTEXT, OWN, a, sharing, declared=list(TARGETS)) for a in kit.agents(sharing)])
    for request_id, agent in zip(ids, kit.agents(sharing), strict=True):
        kit.check(engine, request_id, OWN, agent, sharing)


@pytest.mark.parametrize("sharing", ["isolated", "base", "eager", "residual"])
def test_a_preempted_turn_goes_on_as_if_nothing_had_happened(kit: Kit, sharing: str) -> None:
    pages_per_slab = ModelEngine(kit.model_dir, {}, 4, num_slabs=1).runner.geometry.pages_per_slab(None)
    engine = ModelEngine(kit.model_dir, kit.adapter_dirs, 4, num_slabs=32 // pages_per_slab + 1)
    owns = [[n, *OWN] for n in range(4)]
    ids = engine.run_all([engine.ask(CONTEXT, own, kit.agents(sharing)[0], sharing, max_tokens=24) for own in owns])
    assert engine.engine.status().counters.preemptions > 0
    for request_id, own in zip(ids, owns, strict=True):
        kit.check(engine, request_id, own, kit.agents(sharing)[0], sharing)


@pytest.mark.parametrize("sharing", ["isolated", "base", "eager", "residual"])
def test_a_turn_resumed_elsewhere_goes_on_where_it_stopped(kit: Kit, sharing: str) -> None:
    first = ModelEngine(kit.model_dir, kit.adapter_dirs)
    (whole,) = first.run_all([first.ask(CONTEXT, OWN, kit.agents(sharing)[0], sharing)])
    generated = first.outputs[whole][:4]
    other = ModelEngine(kit.model_dir, kit.adapter_dirs, 4, max_num_batched_tokens=11)
    (rest,) = other.run_all([other.ask(CONTEXT, OWN, kit.agents(sharing)[0], sharing, resumed=generated)])
    assert len(other.outputs[rest]) == 10 - 4
    kit.check(other, rest, [*OWN, *generated], kit.agents(sharing)[0], sharing)


def test_the_oracle_tells_the_sharing_modes_apart(kit: Kit) -> None:
    logits = [kit.oracles["qv"].logits(CONTEXT, OWN, sharing) for sharing in ("isolated", "base", "eager", "residual")]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 1e-2
