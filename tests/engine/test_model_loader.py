"""Checkpoints: what is read of them, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.engine.model_loader import load_model, resolve_device
from forkkv_cluster.engine.model_runner import ModelRunner
from tests.engine.families import LLAMA3_ROPE, SMALL, engine_logits, save

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small checkpoint that a test may break."""
    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path / "model")


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits_of(directory: Path) -> torch.Tensor:
    return engine_logits(ModelRunner.from_directory(directory, page_size=16))


def test_a_sharded_checkpoint_equals_a_single_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    save(model, tmp_path / "one")
    model.save_pretrained(str(tmp_path / "many"), max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(tmp_path / "one"), logits_of(tmp_path / "many"))


def test_rope_settings_of_older_configs_are_read(checkpoint: Path) -> None:
    old = Path(shutil.copytree(checkpoint, checkpoint.parent / "old"))
    edit_config(checkpoint, rope_parameters=LLAMA3_ROPE)
    config = json.loads((old / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    (old / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0, "rope_scaling": scaling}))
    assert torch.equal(logits_of(checkpoint), logits_of(old))


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [({"eos_token_id": [5, 6]}, 7, (5, 6)), ({"eos_token_id": 5}, 7, (5,)), ({}, [7, 8], (7, 8)), ({}, None, ())],
    ids=str,
)
def test_end_tokens_come_from_the_generation_config_first(
    checkpoint: Path, generation: dict[str, Any], config: Any, wanted: tuple[int, ...]
) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    edit_config(checkpoint, eos_token_id=config)
    assert load_model(checkpoint, "float32", CPU).config.eos_token_ids == wanted


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "gptq"}),
        ("num_local_experts", 8),
        ("vision_config", {"hidden_size": 8}),
        ("layer_types", ["full_attention", "linear_attention"]),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "proportional", "factor": 2.0}),
        ("architectures", ["MixtralForCausalLM"]),
        ("architectures", None),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(checkpoint: Path, field: str, value: object) -> None:
    edit_config(checkpoint, **{field: value})
    named = "rope_type" if field == "rope_parameters" else field
    with pytest.raises(Unsupported, match=named):
        load_model(checkpoint, "float32", CPU)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"])
def test_a_missing_size_is_refused_by_name(checkpoint: Path, field: str) -> None:
    edit_config(checkpoint, **{field: None})
    with pytest.raises(InvalidArgument, match=field):
        load_model(checkpoint, "float32", CPU)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused_by_name(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(InvalidArgument, match=name):
        load_model(checkpoint, "float32", CPU)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="not a directory"):
        load_model(tmp_path / "nowhere", "float32", CPU)


def test_truncated_weights_are_refused_with_the_file(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InvalidArgument, match=r"model\.safetensors"):
        load_model(checkpoint, "float32", CPU)


def rewrite(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    edit(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def test_a_missing_tensor_is_refused_by_name(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InvalidArgument, match=r"layers\.1\.mlp\.up_proj\.weight.*missing"):
        load_model(checkpoint, "float32", CPU)


def test_a_wrong_shape_is_refused_with_both_shapes(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}))
    with pytest.raises(InvalidArgument, match=r"\(31,\).*\(32,\)"):
        load_model(checkpoint, "float32", CPU)


def test_a_tensor_that_the_model_does_not_know_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(8)}))
    with pytest.raises(Unsupported, match="q_norm"):
        load_model(checkpoint, "float32", CPU)


def test_integer_weights_are_refused_as_quantised(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}))
    with pytest.raises(Unsupported, match="quantised"):
        load_model(checkpoint, "float32", CPU)


def test_the_digest_follows_the_content_not_the_place(checkpoint: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, checkpoint.parent / "copy"))
    digest = load_model(checkpoint, "float32", CPU).digest
    assert load_model(copy, "float32", CPU).digest == digest
    rewrite(copy, lambda tensors: tensors.update({"model.norm.weight": torch.full((32,), 2.0)}))
    assert load_model(copy, "float32", CPU).digest != digest


def test_auto_is_float32_on_a_cpu(checkpoint: Path) -> None:
    edit_config(checkpoint, dtype="bfloat16")
    assert load_model(checkpoint, "auto", CPU).dtype == torch.float32


def test_unknown_dtypes_and_devices_are_refused(checkpoint: Path) -> None:
    with pytest.raises(Unsupported, match="dtype"):
        load_model(checkpoint, "int4", CPU)
    with pytest.raises(InvalidArgument, match="device"):
        resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="device"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU
