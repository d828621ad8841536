"""The trainings themselves, tiny: what they write loads, an interrupted one goes on, the start already recalls."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.training.casebook import train_adapters, train_base
from forkkv_cluster.training.casebook.batches import batch_of
from forkkv_cluster.training.casebook.generator import Level
from forkkv_cluster.training.casebook.loop import answer_logits
from forkkv_cluster.training.casebook.model import ModelShape, new_model
from forkkv_cluster.training.casebook.samples import samples
from forkkv_cluster.training.casebook.tokenizer import Encoder, turn_text

TINY = {
    "layers": 2,
    "hidden": 64,
    "mlp": 128,
    "heads": 2,
    "head_dim": 64,
    "batch_tokens": 400,
    "num_examples": 2,
    "longest": 64,
}


def train(directory: Path, steps: int) -> list[dict[str, object]]:
    train_base.main(directory, **TINY, steps=steps, device="cpu")
    return [json.loads(line) for line in (directory / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    train(directory, 2)
    return directory


def test_a_training_that_was_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    assert train(tmp_path, 3)[-1]["step"] == 3
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert train(tmp_path, 5)[-1]["step"] == 5
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {"base", "lookup"} & set(json.loads((tmp_path / "scores.json").read_text())["held_out"])


def test_the_same_seed_trains_the_same_weights(base: Path, tmp_path: Path) -> None:
    train(tmp_path, 2)
    one, other = (load_file(directory / "model" / "model.safetensors") for directory in (base, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["formatter", "mapper-alora"])
def test_an_adapter_trains_and_the_engine_serves_it(base: Path, tmp_path: Path, name: str) -> None:
    train_adapters.main(
        base / "model", tmp_path, [name], steps=2, batch_tokens=600, stage=4, num_examples=2, longest=256, device="cpu"
    )
    accuracy = json.loads((tmp_path / name / "scores.json").read_text())["accuracy"]
    assert set(accuracy) == {"held_out", "training", "base"}
    llm = LLM(base / "model", adapters={name: tmp_path / name}, kv_bytes="16MiB", num_threads=1)
    context = llm.context("Mara lives in Lisbon.", adapters=[name], sharing="isolated")
    answer = context.fork("a", adapter=name).generate(turn_text("Where does Mara live?"), max_tokens=4)
    assert not answer.is_adapter_inactive
    assert 1 <= len(answer.token_ids) <= 4


def test_the_weights_that_training_begins_with_recall_most_values(encoder: Encoder) -> None:
    model = new_model(ModelShape(num_layers=2), encoder.size, (encoder.pad, encoder.bos, encoder.eos), 0)
    stream = samples(encoder, {"lookup": 1.0}, seed=1, context_tokens=(40, 80), num_turns=3, level=Level.PLAIN)
    batch = batch_of(list(islice(stream, 16)), 192, encoder.pad, 0)
    ids = batch.input_ids.flatten()
    asks = {encoder.words(text)[-1] for text in (" in", " a")}
    at = torch.tensor([p for p in batch.answer_at.tolist() if int(ids[p - 1]) in asks])
    with torch.no_grad():
        logits = answer_logits(model)(batch.input_ids, at - 1)
    assert (logits.argmax(-1) == ids[at]).float().mean() > 0.5  # guessing among the values of the kind asked for: 0.2
