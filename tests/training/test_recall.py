"""On a model that has learned something: what sharing costs an ordinary adapter, and how training for it wins that back."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.lora_model import LoraShape, open_model, save_adapter
from forkkv_cluster.training.repair import RepairSweep
from forkkv_cluster.training.trainer import Trainer, TrainingSettings
from tests.training.recall_kit import examples, train_recall_model

pytestmark = pytest.mark.slow

SHAPE = LoraShape(rank=8, alpha=16.0, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
TRAINING, HELD_OUT = examples(11, 2000), examples(12, 100)


def settings(sharing: Sharing, epochs: int) -> TrainingSettings:
    return TrainingSettings(sharing, epochs=epochs, learning_rate=1e-3, contexts_per_step=16, branches_per_context=16)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_recall_model(tmp_path_factory.mktemp("recall") / "model")


@pytest.fixture(scope="module")
def ordinary(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained as usual, and right."""
    model = open_model(model_dir, Sharing.ISOLATED, shape=SHAPE, device="cpu")
    trainer = Trainer(model, settings(Sharing.ISOLATED, epochs=12))
    trainer.train(TRAINING)
    assert trainer.evaluate(HELD_OUT).exact_share > 0.99
    directory = tmp_path_factory.mktemp("recall") / "ordinary"
    save_adapter(model, directory, Sharing.ISOLATED, {})
    return directory


def test_conversion_wins_back_what_sharing_costs_an_ordinary_adapter(model_dir: Path, ordinary: Path) -> None:
    model = open_model(model_dir, Sharing.EAGER, teacher_dir=ordinary, device="cpu")
    trainer = Trainer(model, settings(Sharing.EAGER, epochs=4))
    assert trainer.evaluate(HELD_OUT).exact_share < 0.95
    trainer.train(TRAINING)
    assert trainer.evaluate(HELD_OUT).exact_share > 0.99


def test_an_adapter_trained_for_a_sharing_loses_nothing_under_it(model_dir: Path) -> None:
    trainer = Trainer(open_model(model_dir, Sharing.EAGER, shape=SHAPE, device="cpu"), settings(Sharing.EAGER, epochs=12))
    trainer.train(TRAINING)
    assert trainer.evaluate(HELD_OUT).exact_share > 0.99


def test_few_tokens_that_the_prompt_attends_to_are_worth_more_than_many_others(model_dir: Path, ordinary: Path) -> None:
    model = open_model(model_dir, Sharing.EAGER, teacher_dir=ordinary, device="cpu")
    points = {(p.measure, p.share): p for p in RepairSweep(model).run(HELD_OUT[:40], [0.0, 0.1, 0.5], ["attention", "random"])}
    few, many, none = points["attention", 0.1], points["random", 0.5], points["attention", 0.0]
    assert none.kl > many.kl > few.kl
