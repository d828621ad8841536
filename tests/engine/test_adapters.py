"""PEFT directories: what is read of them, and what cannot be served is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from forkkv_cluster.core.adapter_semantics import write_trained_for
from forkkv_cluster.core.errors import InvalidArgument, NotFound, Unsupported
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.engine.adapters import AdapterSlots, AdapterWeights
from forkkv_cluster.engine.adapters import load_adapter as load
from forkkv_cluster.engine.model_loader import load_model
from forkkv_cluster.engine.model_runner import ModelRunner
from forkkv_cluster.testing.tiny_models import TinyKit, TinyModelSpec, build_tiny_kit

CPU = torch.device("cpu")

LoadAdapter = Callable[[Path], AdapterWeights]


@pytest.fixture(scope="module")
def load_here(tiny_model_dir: Path) -> LoadAdapter:
    loaded = load_model(tiny_model_dir, "float32", CPU)
    geometry = ModelRunner(loaded, name="tiny", page_size=16, device=CPU).geometry
    return lambda path: load("some-name", path, loaded.config, geometry, torch.float32, CPU)


@pytest.fixture
def critic(tiny_kit: TinyKit, tmp_path: Path) -> Path:
    """A copy of an adapter that a test may break: rank 16 on q, k, v, o."""
    return Path(shutil.copytree(tiny_kit.adapter_dirs["critic"], tmp_path / "critic"))


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in edit(load_file(path)).items()}, path)


def layer_name(module: str, factor: str, layer: int = 0) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{factor}.weight"


def test_info_names_rank_targets_and_residual_bytes(load_here: LoadAdapter, tiny_kit: TinyKit) -> None:
    info = load_here(tiny_kit.adapter_dirs["critic"]).info
    assert (info.name, info.lora_rank, info.target_modules) == ("some-name", 16, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert info.residual_bytes_per_token == 4 * 2 * 16 * 4
    assert len(info.digest) == 32


def test_without_lora_on_k_and_v_there_is_no_residual(load_here: LoadAdapter, tiny_kit: TinyKit) -> None:
    weights = load_here(tiny_kit.adapter_dirs["scout"])
    assert (weights.residual_rank, weights.info.residual_bytes_per_token) == (0, 0)


def test_what_it_was_trained_for_is_read_and_no_part_of_its_digest(load_here: LoadAdapter, critic: Path) -> None:
    ordinary = load_here(critic).info
    write_trained_for(critic, Sharing.EAGER, {})
    trained = load_here(critic).info
    assert (ordinary.trained_for, trained.trained_for, trained.ref.trained_for) == (None, Sharing.EAGER, Sharing.EAGER)
    assert trained.digest == ordinary.digest
    (critic / "forkkv.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"forkkv\.json"):
        load_here(critic)


def test_shrinks_are_fused_by_input(load_here: LoadAdapter, tiny_kit: TinyKit) -> None:
    layer = load_here(tiny_kit.adapter_dirs["coder"]).layers[0]
    assert layer.qkv is not None
    assert layer.gate_up is not None
    assert layer.qkv.a.shape == (3 * 16, 128)
    assert layer.gate_up.a.shape == (2 * 16, 128)


def test_the_digest_follows_the_content_not_the_place(load_here: LoadAdapter, tiny_kit: TinyKit, critic: Path) -> None:
    original = load_here(tiny_kit.adapter_dirs["critic"]).info.digest
    assert load_here(critic).info.digest == original
    edit_tensors(critic, lambda tensors: {name: tensor * 1.001 for name, tensor in tensors.items()})
    assert load_here(critic).info.digest != original


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("loftq_config", {"loftq_bits": 4}),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "PiSSA"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of-a-later-peft"),
        ("init_lora_weights", 3),
        ("peft_type", "LOHA"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(load_here: LoadAdapter, critic: Path, field: str, value: object) -> None:
    edit_config(critic, **{field: value})
    with pytest.raises(Unsupported, match=field):
        load_here(critic)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"q_proj": 16, "k_proj(": 16}, r"='k_proj\(': is not a regular expression"),
        ({"*": 16}, r"='\*': is not a regular expression"),
        ({"k_proj": "16"}, r"\[k_proj\]='16': is not a number"),
        (["k_proj"], r"=\['k_proj'\]: is not a map"),
    ],
    ids=["open-bracket", "star", "text", "list"],
)
def test_a_broken_pattern_is_refused_by_name(load_here: LoadAdapter, critic: Path, key: str, value: object, named: str) -> None:
    edit_config(critic, **{key: value})
    with pytest.raises(InvalidArgument, match=f"{key}{named}"):
        load_here(critic)


def test_an_alora_is_known_by_its_invocation_and_has_no_residual(load_here: LoadAdapter, critic: Path) -> None:
    plain = load_here(critic)
    edit_config(critic, alora_invocation_tokens=[5, 6, 5])
    weights = load_here(critic)
    assert weights.info.invocation_tokens == (5, 6, 5)
    assert (weights.residual_rank, weights.info.residual_bytes_per_token, weights.info.lora_rank) == (0, 0, 16)
    assert weights.info.digest != plain.info.digest
    assert plain.info.invocation_tokens == ()


@pytest.mark.parametrize("tokens", [[], "hello", [5, -1], [5, 8192], [5, 1.0], [True], [[5]]])
def test_an_invocation_that_no_prompt_can_hold_is_refused(load_here: LoadAdapter, critic: Path, tokens: object) -> None:
    edit_config(critic, alora_invocation_tokens=tokens)
    with pytest.raises(InvalidArgument, match="alora_invocation_tokens"):
        load_here(critic)


def test_lora_on_another_module_is_refused_by_name(load_here: LoadAdapter, critic: Path) -> None:
    edit_tensors(critic, lambda tensors: {**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(16, 128)})
    with pytest.raises(Unsupported, match="lm_head"):
        load_here(critic)


def test_an_adapter_of_another_base_model_is_refused_with_both_shapes(load_here: LoadAdapter, tmp_path: Path) -> None:
    other = build_tiny_kit(tmp_path / "other", num_adapters=1, spec=TinyModelSpec(hidden_size=64, num_layers=1))
    with pytest.raises(InvalidArgument, match=r"k_proj\.lora_A\.weight.*\(8, 64\), not \(8, 128\)"):
        load_here(other.adapter_dirs["planner"])


def test_an_adapter_of_a_deeper_model_is_refused(load_here: LoadAdapter, critic: Path) -> None:
    edit_tensors(critic, lambda t: {**t, layer_name("q_proj", "A", 7): torch.zeros(16, 128)})
    with pytest.raises(InvalidArgument, match="has 4 layers"):
        load_here(critic)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_a_wrong_dtype_is_refused(load_here: LoadAdapter, critic: Path, dtype: torch.dtype) -> None:
    edit_tensors(critic, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    with pytest.raises(InvalidArgument, match="wrong dtype"):
        load_here(critic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_adapters_load(load_here: LoadAdapter, critic: Path, dtype: torch.dtype) -> None:
    edit_tensors(critic, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    layer = load_here(critic).layers[0]
    assert layer.qkv is not None
    assert layer.qkv.a.dtype == torch.float32


def test_corrupt_weights_are_refused_with_the_file(load_here: LoadAdapter, critic: Path) -> None:
    (critic / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header at all")
    with pytest.raises(InvalidArgument, match=r"adapter_model\.safetensors.*not a sound safetensors file"):
        load_here(critic)


def test_truncated_weights_are_refused_with_the_file(load_here: LoadAdapter, critic: Path) -> None:
    path = critic / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidArgument, match=r"adapter_model\.safetensors"):
        load_here(critic)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused_by_name(load_here: LoadAdapter, critic: Path, name: str) -> None:
    (critic / name).unlink()
    with pytest.raises(InvalidArgument, match=name):
        load_here(critic)


def test_a_config_that_is_not_json_is_refused(load_here: LoadAdapter, critic: Path) -> None:
    (critic / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidArgument, match="is not JSON"):
        load_here(critic)


def test_a_factor_without_its_twin_is_refused(load_here: LoadAdapter, critic: Path) -> None:
    lost = layer_name("k_proj", "B", 2)
    edit_tensors(critic, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    with pytest.raises(InvalidArgument, match=r"layers\.2\.self_attn\.k_proj\.lora_B\.weight.*missing"):
        load_here(critic)


def test_a_target_without_tensors_is_refused(load_here: LoadAdapter, critic: Path) -> None:
    edit_config(critic, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    with pytest.raises(InvalidArgument, match="up_proj"):
        load_here(critic)


def test_nan_weights_are_refused(load_here: LoadAdapter, critic: Path) -> None:
    edit_tensors(critic, lambda t: {**t, layer_name("v_proj", "B"): torch.full((64, 16), float("nan"))})
    with pytest.raises(InvalidArgument, match="NaN"):
        load_here(critic)


def test_a_rank_beyond_the_largest_class_is_refused(load_here: LoadAdapter, tiny_model_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = LoraConfig(r=200, target_modules=["k_proj"])
    get_peft_model(base, config).save_pretrained(str(tmp_path / "wide"), save_embedding_layers=False)
    with pytest.raises(InvalidArgument, match="lora_rank"):
        load_here(tmp_path / "wide")


def test_slots_are_small_and_used_again(load_here: LoadAdapter, tiny_kit: TinyKit) -> None:
    slots, weights = AdapterSlots(), load_here(tiny_kit.adapter_dirs["critic"])
    assert [slots.add(weights) for _ in range(3)] == [0, 1, 2]
    slots.remove(1)
    with pytest.raises(NotFound):
        slots[1]
    with pytest.raises(NotFound):
        slots.remove(1)
    assert [slots.add(weights) for _ in range(2)] == [1, 3]
