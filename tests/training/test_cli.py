"""``forkkv train-adapter`` from files to an adapter that the engine serves, and its refusals before any step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from forkkv_cluster.__main__ import cli
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.testing.tiny_models import TinyKit, save_alora_adapter
from tests.training.kit import random_model

runner = CliRunner()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [
        {"context": f"The {c} house stands on the hill.", "prompt": f" Who is {p}?", "completion": f" {p} of {c}."}
        for c in ("red", "old")
        for p in ("Ann", "Bob", "Cid")
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def train(model: Path, data: Path, out: Path, *options: str) -> Any:
    arguments = ["train-adapter", str(model), str(data), "--out", str(out), "--device", "cpu", "--max-steps", "3", *options]
    return runner.invoke(cli, arguments)


def test_an_adapter_is_trained_and_served_as_it_says(tiny_kit: TinyKit, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(tiny_kit.model_dir, data, out, "--eval-data", str(data), "--rank", "4", "--lr", "0.01", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["trained_for"], report["num_steps"], report["num_branches"]) == ("eager", 3, 6)
    assert report["last_loss"] < report["first_loss"]
    assert sorted(report["quality"]) == ["trained, eager", "untrained"]
    assert report["quality"]["trained, eager"]["cross_entropy"] < report["quality"]["untrained"]["cross_entropy"]
    info = LLM(tiny_kit.model_dir, {"out": out}, device="cpu", kv_bytes="8MiB").engine.list_adapters()[0]
    assert (info.trained_for, info.lora_rank) == ("eager", 4)
    provenance = json.loads((out / "forkkv.json").read_text())["training"]
    assert provenance["data"]["branches"] == 6
    assert str(tmp_path) not in json.dumps(provenance)


def test_an_ordinary_adapter_is_converted_without_completions(tiny_kit: TinyKit, data: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "unlabelled.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    unlabelled.write_text("\n".join(json.dumps({"context": r["context"], "prompt": r["prompt"]}) for r in rows))
    teacher, out = tiny_kit.adapter_dirs["critic"], tmp_path / "out"
    options = ["--from-adapter", str(teacher), "--semantics", "residual", "--completion-tokens", "4", "--eval-data", str(data)]
    result = train(tiny_kit.model_dir, unlabelled, out, *options)
    assert result.exit_code == 0, result.output
    assert "teacher, isolated" in result.stdout
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (16, ["k_proj", "o_proj", "q_proj", "v_proj"])
    assert json.loads((out / "forkkv.json").read_text())["trained_for"] == "residual"


def test_a_new_shape_learns_from_an_ordinary_adapter(tiny_kit: TinyKit, data: Path, tmp_path: Path) -> None:
    teacher, out = tiny_kit.adapter_dirs["tester"], tmp_path / "out"
    assert train(tiny_kit.model_dir, data, out, "--from-adapter", str(teacher), "--rank", "2").exit_code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], len(config["target_modules"])) == (2, 7)


def refused(result: Any) -> str:
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def test_what_cannot_be_trained_is_refused_by_name(tiny_kit: TinyKit, data: Path, tmp_path: Path) -> None:
    model = tiny_kit.model_dir
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "is not empty" in refused(train(model, data, tmp_path / "full"))
    assert "'lm_head'" in refused(train(model, data, tmp_path / "out", "--targets", "q_proj,lm_head"))
    assert "sharing=" in refused(train(model, data, tmp_path / "out", "--semantics", "auto"))
    assert "rank=" in refused(train(model, data, tmp_path / "out", "--rank", "200"))
    alora = save_alora_adapter(model, tmp_path / "alora", [5, 6])
    assert "aLoRA" in refused(train(model, data, tmp_path / "out", "--from-adapter", str(alora)))
    ordinary = str(tiny_kit.adapter_dirs["critic"])
    assert "--alpha" in refused(train(model, data, tmp_path / "out", "--from-adapter", ordinary, "--alpha", "4"))
    assert not (tmp_path / "out").exists()


def test_a_rank_whose_residual_has_no_class_is_refused_where_it_would_be_shared(tmp_path: Path) -> None:
    model = random_model(tmp_path, "qwen3")  # keeps two numbers more a token than its rank, of at most 128
    rows = tmp_path / "ids.jsonl"
    rows.write_text(json.dumps({"context": [1, 2], "prompt": [3], "completion": [4]}))
    assert "rank class" in refused(train(model, rows, tmp_path / "out", "--rank", "128"))
    assert train(model, rows, tmp_path / "out", "--rank", "128", "--semantics", "base").exit_code == 0
