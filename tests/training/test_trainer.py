"""Training lowers its loss under the semantics named, and the engine serves what came of it as the trainer computed it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from forkkv_cluster.core.adapter_semantics import read_trained_for
from forkkv_cluster.core.errors import FailedPrecondition, InvalidArgument
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.examples import BranchExample, ContextExamples
from forkkv_cluster.training.lora_model import LoraModel, LoraShape, open_model, save_adapter
from forkkv_cluster.training.teacher import complete
from forkkv_cluster.training.trainer import Trainer, TrainingSettings
from tests.engine.model_engine import ModelEngine
from tests.training.kit import CONTEXT, OWN, SHARINGS, branch_logits, opened, random_adapter, random_model

EXAMPLES = [
    ContextExamples(
        tuple((31 * i + 7 * c) % 290 for i in range(20 + 3 * c)),
        tuple(BranchExample((c, b, 5), (290 + (b + c) % 8, (b * 3) % 300, 299)) for b in range(3)),
    )
    for c in range(4)
]
FAST = {"learning_rate": 2e-2, "contexts_per_step": 2, "epochs": 6}


def new_model(model_dir: Path, sharing: Sharing = Sharing.EAGER, **options: object) -> LoraModel:
    return open_model(model_dir, sharing, shape=LoraShape(rank=4, alpha=8.0), device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen2", "qwen3"])
def test_the_engine_serves_a_trained_adapter_as_the_trainer_computed_it(family: str, tmp_path: Path) -> None:
    model_dir = random_model(tmp_path, family)
    trained: dict[str, tuple[LoraModel, Path]] = {}
    for sharing in (Sharing.EAGER, Sharing.RESIDUAL, Sharing.BASE):
        model = new_model(model_dir, sharing)
        result = Trainer(model, TrainingSettings(sharing=sharing, **FAST)).train(EXAMPLES)  # type: ignore[arg-type]
        assert result.losses[-1] < 0.7 * result.losses[0]
        save_adapter(model, tmp_path / sharing, sharing, {})
        trained[sharing] = (model, tmp_path / sharing)
    engine = ModelEngine(model_dir, {sharing: directory for sharing, (_, directory) in trained.items()})
    for sharing, (model, _) in trained.items():
        request = engine.ask(CONTEXT, OWN, sharing, sharing, max_tokens=6, declared=[sharing])
        (done,) = engine.run_all([request])
        output = engine.outputs[done]
        logits = branch_logits(model, Sharing(sharing), own=[*OWN, *output[:-1]]).detach()
        engine.assert_answers(done, logits[len(OWN) - 1 :])


def test_the_result_is_a_peft_directory_that_names_its_semantics(tmp_path: Path) -> None:
    model_dir = random_model(tmp_path)
    model = new_model(model_dir, Sharing.RESIDUAL)
    Trainer(model, TrainingSettings(sharing=Sharing.RESIDUAL, max_steps=2, **FAST)).train(EXAMPLES)  # type: ignore[arg-type]
    save_adapter(model, tmp_path / "out", Sharing.RESIDUAL, {"steps": 2})
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != "README.md") == [
        "adapter_config.json", "adapter_model.safetensors", "forkkv.json",
    ]  # fmt: skip
    assert read_trained_for(tmp_path / "out") is Sharing.RESIDUAL
    assert json.loads((tmp_path / "out" / "forkkv.json").read_text())["training"] == {"steps": 2}
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    with torch.no_grad():
        wanted = loaded(torch.tensor([[*CONTEXT, *OWN]])).logits[0, len(CONTEXT) :]
    torch.testing.assert_close(branch_logits(model, Sharing.ISOLATED).detach(), wanted, atol=5e-5, rtol=0)


def weights_after(model_dir: Path, **settings: object) -> list[Tensor]:
    model = open_model(model_dir, Sharing.EAGER, shape=LoraShape(rank=4, dropout=0.1), device="cpu", seed=3)
    Trainer(model, TrainingSettings(max_steps=3, **{"seed": 3, **FAST, **settings})).train(EXAMPLES)  # type: ignore[arg-type]
    return [parameter.detach() for parameter in model.parameters()]


def test_a_seed_repeats_its_training(tmp_path: Path) -> None:
    model_dir = random_model(tmp_path)
    first, again, other = weights_after(model_dir), weights_after(model_dir), weights_after(model_dir, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_a_converted_adapter_answers_shared_as_its_original_does_isolated(family: str, tmp_path: Path) -> None:
    model_dir = random_model(tmp_path, family)
    model = opened(model_dir, random_adapter(model_dir, tmp_path / "ordinary", target_modules=["k_proj", "v_proj", "o_proj"]))
    unlabelled = [ContextExamples(e.context, tuple(BranchExample(b.prompt, ()) for b in e.branches)) for e in EXAMPLES]
    completed = complete(model, unlabelled, max_tokens=6)
    trainer = Trainer(model, TrainingSettings(**(FAST | {"learning_rate": 5e-3, "epochs": 12, "prompt_weight": 1.0})))  # type: ignore[arg-type]
    before = trainer.evaluate(completed)
    losses = trainer.train(completed).losses
    after = trainer.evaluate(completed)
    assert losses[-1] < 0.3 * losses[0]
    assert after.token_accuracy > before.token_accuracy
    assert trainer.evaluate(completed, Sharing.ISOLATED, "teacher").token_accuracy == 1.0


def test_completions_are_the_teachers_own_greedy_ones(tmp_path: Path) -> None:
    model_dir = random_model(tmp_path)
    adapter_dir = random_adapter(model_dir, tmp_path / "ordinary")
    model = opened(model_dir, adapter_dir)
    kept = BranchExample((1, 2), (3,))
    asked = [ContextExamples(tuple(CONTEXT[: 20 + i]), (BranchExample(tuple(OWN[: 3 + i]), ()), kept)) for i in range(3)]
    engine = ModelEngine(model_dir, {"ordinary": adapter_dir})
    for row, completed in zip(asked, complete(model, asked, max_tokens=5, prompts_per_batch=2), strict=True):
        request = engine.ask([], [*row.context, *row.branches[0].prompt], "ordinary", "isolated", max_tokens=5)
        (done,) = engine.run_all([request])
        assert completed.branches == (BranchExample(row.branches[0].prompt, tuple(engine.outputs[done])), kept)


def test_only_what_counts_is_learnt(tmp_path: Path) -> None:
    model_dir = random_model(tmp_path)
    losses = {}
    for weight in (0.0, 1.0):
        settings = TrainingSettings(max_steps=1, prompt_weight=weight, **FAST)  # type: ignore[arg-type]
        (losses[weight],) = Trainer(new_model(model_dir), settings).train(EXAMPLES).losses
    assert losses[0.0] != losses[1.0]


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    model = new_model(random_model(tmp_path))
    with torch.no_grad():
        model.parameters()[0].fill_(float("nan"))
    with pytest.raises(FailedPrecondition, match="learning rate"):
        Trainer(model, TrainingSettings()).train(EXAMPLES)


@pytest.mark.parametrize(
    ("name", "value"), [("sharing", Sharing.AUTO), ("learning_rate", 0.0), ("max_steps", 0), ("prompt_weight", 1.5)]
)
def test_a_setting_that_cannot_be_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        TrainingSettings(**{name: value}).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize("sharing", SHARINGS)
def test_before_training_a_new_adapter_is_the_base_model(sharing: Sharing, tmp_path: Path) -> None:
    model = new_model(random_model(tmp_path))
    with torch.no_grad():
        wanted = model.causal_lm.eval()(torch.tensor([[*CONTEXT, *OWN]])).logits[0, len(CONTEXT) :]
    torch.testing.assert_close(branch_logits(model, sharing).detach(), wanted, atol=5e-5, rtol=0)
