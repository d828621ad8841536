"""The trainer computes what the engine will serve: held to formulas that share no code with it, values and gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.examples import BranchExample, ContextExamples
from tests.engine.qwen3_kit import ADAPTERS
from tests.oracle.oracle import Oracle
from tests.training.kit import CONTEXT, OWN, SHARINGS, branch_logits, opened, random_adapter, random_model, row_logits

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")


@pytest.mark.parametrize("family", ["llama-gqa", "llama-biased-wide-heads", "mistral", "qwen2-mha-tied", "qwen3"])
def test_every_family_answers_as_the_oracle_under_every_sharing(family: str, tmp_path: Path) -> None:
    model_dir = random_model(tmp_path, family)
    adapter_dir = random_adapter(model_dir, tmp_path / "adapter")
    model, oracle = opened(model_dir, adapter_dir), Oracle(model_dir)
    answers = {}
    for sharing in SHARINGS:
        answers[sharing] = branch_logits(model, sharing).detach()
        wanted = oracle.logits(CONTEXT, OWN, oracle.adapter(adapter_dir), sharing)
        torch.testing.assert_close(answers[sharing], wanted, atol=5e-5, rtol=0)
    assert all((answers[s] - answers[Sharing.ISOLATED]).abs().max() > 1e-2 for s in SHARINGS[1:])


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "k-in-one-layer"])
def test_with_qk_norm_every_kind_of_adapter_answers_as_the_oracle(name: str, tmp_path: Path) -> None:
    model_dir = random_model(tmp_path, "qwen3")
    adapter_dir = random_adapter(model_dir, tmp_path / name, **ADAPTERS[name])
    model, oracle = opened(model_dir, adapter_dir), Oracle(model_dir)
    for sharing in SHARINGS:
        wanted = oracle.logits(CONTEXT, OWN, oracle.adapter(adapter_dir), sharing)
        torch.testing.assert_close(branch_logits(model, sharing).detach(), wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize("sharing", [Sharing.EAGER, Sharing.RESIDUAL, Sharing.ISOLATED])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_gradients_are_the_oracles_finite_differences(family: str, sharing: Sharing, tmp_path: Path) -> None:
    model_dir = random_model(tmp_path, family)
    adapter_dir = random_adapter(model_dir, tmp_path / "adapter")
    model, oracle = opened(model_dir, adapter_dir), Oracle(model_dir, torch.float64)
    model.peft_model.double()
    weights = torch.randn(len(OWN), 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (branch_logits(model, sharing) * weights).sum().backward()
    adapter = oracle.adapter(adapter_dir)
    for layer, module, factor in [(0, "k_proj", 0), (0, "k_proj", 1), (0, "v_proj", 0), (1, "k_proj", 0), (1, "v_proj", 1)]:
        name = f"layers.{layer}.self_attn.{module}"
        gradient = gradient_of(model, name, factor)
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def moved(step: float, name: str = name, factor: int = factor, direction: Tensor = direction) -> float:
            factors = list(adapter.factors[name])
            factors[factor] = factors[factor] + step * direction
            shifted = replace(adapter, factors={**adapter.factors, name: tuple(factors)})
            return float((oracle.logits(CONTEXT, OWN, shifted, sharing) * weights).sum())

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert abs(slope) > 1e-2
        # Transformers' rotation has fp32 angles, the oracle's are fp64.
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4 * float(gradient.norm()))


def gradient_of(model: object, name: str, factor: int) -> Tensor:
    suffix = f"{name}.lora_{'AB'[factor]}.default.weight"
    (parameter,) = [p for n, p in model.peft_model.named_parameters() if n.endswith(suffix)]  # type: ignore[attr-defined]
    assert parameter.grad is not None
    return parameter.grad


def test_under_base_sharing_no_gradient_comes_through_the_context(tmp_path: Path) -> None:
    model_dir = random_model(tmp_path)
    model = opened(model_dir, random_adapter(model_dir, tmp_path / "adapter"))
    branch_logits(model, Sharing.BASE, own=OWN[:1])[0, 3].backward()
    through_own = gradient_of(model, "layers.0.self_attn.k_proj", 0).clone()
    model.peft_model.zero_grad()
    branch_logits(model, Sharing.EAGER, own=OWN[:1])[0, 3].backward()
    through_context = gradient_of(model, "layers.0.self_attn.k_proj", 0)
    assert through_context.norm() > 3 * through_own.norm()  # 43 tokens of context beside one of its own


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_branch_answers_the_same_alone_and_packed_with_others(sharing: Sharing, tmp_path: Path) -> None:
    model_dir = random_model(tmp_path)
    model = opened(model_dir, random_adapter(model_dir, tmp_path / "adapter"))
    branches = tuple(BranchExample(tuple(OWN[start : start + 4]), tuple(OWN[start : start + 1 + start])) for start in (0, 2, 3))
    rows = [
        ContextExamples(tuple(CONTEXT[:17]), branches),
        ContextExamples(tuple(CONTEXT), branches[:1]),
        ContextExamples(tuple(CONTEXT[5:9]), branches[1:]),
    ]
    packed = row_logits(model, sharing, rows)
    alone = [row_logits(model, sharing, [replace(row, branches=(b,))])[0] for row in rows for b in row.branches]
    assert len(packed) == 6
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_in_bfloat16_factors_learn_in_fp32_and_answers_stay_close(tmp_path: Path) -> None:
    model_dir = random_model(tmp_path)
    adapter_dir = random_adapter(model_dir, tmp_path / "adapter")
    model = opened(model_dir, adapter_dir, dtype="bfloat16")
    rough, exact = branch_logits(model, Sharing.EAGER), branch_logits(opened(model_dir, adapter_dir), Sharing.EAGER)
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    rough.square().mean().backward()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
