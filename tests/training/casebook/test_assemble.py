"""What is put together for shipping: adapters in bfloat16, whatever they were saved in, and no more than may ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from forkkv_cluster.core.adapter_semantics import read_trained_for, write_trained_for
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.casebook import assemble


def adapter(directory: Path, factor: torch.Tensor) -> Path:
    directory.mkdir(parents=True)
    save_file({"lora_A": factor}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    (directory / "training_log.jsonl").write_text('{"event": "end"}\n')
    return directory


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    model = tmp_path / "base" / "model"
    model.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text("{}")
    save_file({"weight": torch.ones(3)}, model / "model.safetensors")
    (tmp_path / "base" / "scores.json").write_text('{"held_out": {}}')
    (tmp_path / "base" / "training_log.jsonl").write_text("{}\n")
    (adapter(tmp_path / "adapters" / "hop", torch.randn(4, 8)) / "scores.json").write_text('{"steps": 7}')
    adapter(tmp_path / "adapters" / "unscored", torch.randn(4, 8))
    write_trained_for(adapter(tmp_path / "eager" / "hop-eager", torch.randn(4, 8)), Sharing.EAGER, {})
    return tmp_path


def test_adapters_ship_in_bfloat16_and_converted_ones_apart_with_what_they_were_trained_for(trained: Path) -> None:
    target = trained / "assets"
    assemble.main(trained / "base", trained / "adapters", trained / "eager", target)
    for shipped, source in (("adapters/hop", "adapters/hop"), ("converted/hop-eager", "eager/hop-eager")):
        factor = load_file(target / shipped / "adapter_model.safetensors")["lora_A"]
        assert torch.equal(factor, load_file(trained / source / "adapter_model.safetensors")["lora_A"].bfloat16())
    assert read_trained_for(target / "converted" / "hop-eager") is Sharing.EAGER
    assert [path.name for path in (target / "adapters").iterdir()] == ["hop"]
    assert json.loads((target / "scores.json").read_text()) == {"base": {"held_out": {}}, "adapters": {"hop": {"steps": 7}}}


def test_more_weights_than_may_ship_are_refused_before_anything_is_written(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (trained / "base" / "model" / "model.safetensors").stat().st_size
    monkeypatch.setattr(assemble, "_MAX_BYTES", size + 2 * 4 * 8 + 2 * 4 * 8 - 1)
    with pytest.raises(typer.BadParameter, match="leave an adapter out"):
        assemble.main(trained / "base", trained / "adapters", trained / "eager", trained / "assets")
    assert not (trained / "assets").exists()
