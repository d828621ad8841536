"""What each family's file says of it, held to what Transformers makes of the same config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forkkv_cluster.core.errors import Unsupported
from forkkv_cluster.engine.model_runner import ModelRunner
from forkkv_cluster.engine.models.config import parse_config
from forkkv_cluster.engine.models.registry import FAMILIES, family_of
from tests.engine.families import TOKENS, assert_same_answers, engine_logits, hugging_face_logits, mistral, qwen2, qwen3, save

WINDOW = 40  # tokens; of 256 positions


def edit_config(directory: Path, **fields: Any) -> None:
    """None removes a field."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def window_of(model: Any, directory: Path, **fields: Any) -> int | None:
    save(model, directory)
    edit_config(directory, **fields)
    raw = json.loads((directory / "config.json").read_text())
    return parse_config(raw, family_of(raw["architectures"]), {}).sliding_window


def test_every_family_has_a_file_of_its_name() -> None:
    directory = Path(parse_config.__code__.co_filename).parent
    assert sorted(FAMILIES) == ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
    for architecture in FAMILIES:
        assert (directory / f"{architecture.removesuffix('ForCausalLM').lower()}.py").exists()


@pytest.mark.parametrize("make", [mistral, qwen2], ids=["mistral", "qwen2"])
def test_a_bias_that_the_family_does_not_know_is_not_looked_for(make: Callable[..., Any], tmp_path: Path) -> None:
    model = make()
    edit_config(save(model, tmp_path / "model"), attention_bias=True)
    runner = ModelRunner.from_directory(tmp_path / "model", page_size=16)
    assert_same_answers(engine_logits(runner), hugging_face_logits(model))


def test_a_qwen3_that_does_not_name_its_head_dim_has_heads_of_128(tmp_path: Path) -> None:
    torch.manual_seed(0)
    directory = save(qwen3(head_dim=128, num_attention_heads=2, num_key_value_heads=1), tmp_path / "model")
    edit_config(directory, head_dim=None)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    runner = ModelRunner.from_directory(directory, page_size=16)
    assert runner.config.head_dim == model.config.head_dim == 128
    assert_same_answers(engine_logits(runner), hugging_face_logits(model))


WINDOWED: dict[str, Callable[[], Any]] = {
    "mistral": lambda: mistral(sliding_window=WINDOW),
    "qwen2": lambda: qwen2(sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: qwen3(sliding_window=WINDOW, use_sliding_window=True, max_window_layers=0),
}


@pytest.mark.parametrize("make", WINDOWED.values(), ids=WINDOWED)
def test_up_to_its_sliding_window_a_model_runs_and_beyond_it_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    directory = save(model, tmp_path / "model")
    with pytest.raises(Unsupported, match=rf"sliding_window={WINDOW}.*max_model_len to at most {WINDOW} \(it is 256\)"):
        ModelRunner.from_directory(directory, page_size=16)
    runner = ModelRunner.from_directory(directory, page_size=16, max_model_len=WINDOW)
    wanted = hugging_face_logits(model)
    assert_same_answers(engine_logits(runner, [30, 1], tokens=TOKENS[:WINDOW]), wanted[:WINDOW])


SWITCHES: dict[str, dict[str, Any]] = {
    "off": {"use_sliding_window": False},
    "not-said": {"use_sliding_window": None},
    "on": {"use_sliding_window": True, "max_window_layers": 1},
    "on-but-no-layer-left": {"use_sliding_window": True, "max_window_layers": 2},
    "layers-by-name": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "no-layer-by-name": {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 2},
}


@pytest.mark.parametrize("fields", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("make", [qwen2, qwen3], ids=["qwen2", "qwen3"])
def test_qwens_window_is_in_use_where_transformers_says_so(
    make: Callable[..., Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    actual = window_of(make(), tmp_path / "model", **({"sliding_window": WINDOW, "layer_types": None} | fields))
    theirs = AutoConfig.from_pretrained(tmp_path / "model")
    assert actual == (theirs.sliding_window if "sliding_attention" in theirs.layer_types else None)


def test_a_mistral_that_names_no_window_has_transformers_default(tmp_path: Path) -> None:
    actual = window_of(mistral(), tmp_path / "model", sliding_window=None, max_position_embeddings=32768)
    assert actual == AutoConfig.from_pretrained(tmp_path / "model").sliding_window == 4096
