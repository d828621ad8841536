"""Random weights from a config.json alone: no file but that one, any dtype, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from forkkv_cluster.core.config import parse_config
from forkkv_cluster.core.errors import Unsupported
from forkkv_cluster.engine.model_loader import load_model
from forkkv_cluster.engine.model_runner import ModelRunner
from forkkv_cluster.engine.torch_runner import TorchRunner
from tests.engine.families import FAMILIES, engine_logits, save


@pytest.fixture(params=["llama-gqa", "llama-tied", "qwen2"])
def config_alone(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    saved = save(FAMILIES[request.param](), tmp_path / "whole")
    directory = tmp_path / "config-alone"
    directory.mkdir()
    (directory / "config.json").write_bytes((saved / "config.json").read_bytes())
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_config_alone_makes_a_model_that_runs_in_any_dtype(config_alone: Path, dtype: str) -> None:
    runner = ModelRunner.from_directory(config_alone, dtype=dtype, page_size=16, load_format="dummy")
    logits = engine_logits(runner, [61, 1])
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.01
    assert runner.dtype == getattr(torch, dtype)


def test_dummy_weights_are_the_same_every_time_and_none_like_another(config_alone: Path) -> None:
    first, second = (ModelRunner.from_directory(config_alone, page_size=16, load_format="dummy") for _ in range(2))
    assert torch.equal(engine_logits(first), engine_logits(second))
    assert first.info.digest == second.info.digest
    taken = load_model(config_alone, "float32", torch.device("cpu"), "dummy").model
    logits = engine_logits(ModelRunner.from_directory(config_alone, page_size=16, load_format="dummy"))
    assert taken.config.num_layers == 2
    assert len({tuple(row.tolist()) for row in logits}) == len(logits)


def test_the_digest_is_that_of_no_checkpoint_and_follows_dtype_and_config(tmp_path: Path) -> None:
    directory = save(FAMILIES["llama-gqa"](), tmp_path / "model")
    cpu = torch.device("cpu")
    digests = [load_model(directory, dtype, cpu, "dummy").digest for dtype in ("float32", "bfloat16")]
    digests.append(load_model(directory, "float32", cpu).digest)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))
    digests.append(load_model(directory, "float32", cpu, "dummy").digest)
    assert len(set(digests)) == 4


def test_the_linear_weights_have_the_spread_that_the_config_names(config_alone: Path) -> None:
    spread = json.loads((config_alone / "config.json").read_text())["initializer_range"]
    embed = load_model(config_alone, "float32", torch.device("cpu"), "dummy").model._weights.embed
    assert float(embed.std()) == pytest.approx(spread, rel=0.05)
    assert float(embed.mean()) == pytest.approx(0.0, abs=spread / 10)


def test_the_configuration_names_the_format(config_alone: Path) -> None:
    config = parse_config({"model": {"path": str(config_alone), "load_format": "dummy"}, "cache": {"page_size": 16}})
    assert TorchRunner.from_config(config).info.vocab_size == 300


def test_an_unknown_format_is_refused_by_name(config_alone: Path) -> None:
    with pytest.raises(Unsupported, match=r"load_format.*pt.*auto, dummy"):
        load_model(config_alone, "float32", torch.device("cpu"), "pt")
