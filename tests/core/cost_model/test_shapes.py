"""Parameters and bytes of known models, against counts of the checkpoints and derivations by hand."""

from __future__ import annotations

import pytest

from forkkv_cluster.cache.geometry import RANK_CLASSES as PAGE_CLASSES
from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.core.cost_model.shapes import (
    KNOWN_SHAPES,
    LLAMA_3_1_8B,
    QWEN_2_5_7B,
    QWEN_3_8B,
    RANK_CLASSES,
    LoraShape,
    ModelShape,
    Workload,
    shape_of,
)
from forkkv_cluster.core.errors import InvalidArgument

KIB = 1024


@pytest.mark.parametrize(
    ("model", "num_params"),
    # Element counts of the published checkpoints.
    [(LLAMA_3_1_8B, 8_030_261_248), (QWEN_2_5_7B, 7_615_616_512), (QWEN_3_8B, 8_190_735_360)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_parameters_are_those_of_the_checkpoint(model: ModelShape, num_params: int) -> None:
    assert model.num_params == num_params


@pytest.mark.parametrize(
    ("model", "base", "residual"),
    # 2 * layers * Hkv * D * 2 bytes; 2 * layers * width of the rank class * 2 bytes.
    # Qwen3 keeps scales of 8 kv heads beside the 16 columns: 24, the class of 32.
    [
        (LLAMA_3_1_8B, 128 * KIB, 2 * KIB),
        (QWEN_2_5_7B, 56 * KIB, int(1.75 * KIB)),
        (QWEN_3_8B, 144 * KIB, int(4.5 * KIB)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bytes_of_a_token(model: ModelShape, base: int, residual: int) -> None:
    assert model.base_bytes_per_token == base
    assert LoraShape(rank=16).residual_bytes_per_token(model) == residual


@pytest.mark.parametrize("model", KNOWN_SHAPES.values(), ids=lambda model: model.name)
@pytest.mark.parametrize("rank", [1, 8, 9, 16, 33, 64])
def test_bytes_of_a_token_are_those_of_the_pages(model: ModelShape, rank: int) -> None:
    geometry = KVGeometry(model.num_layers, model.num_kv_heads, model.head_dim, page_size=64, dtype_bytes=2)
    columns = rank + (model.num_kv_heads if model.qk_norm else 0)
    assert RANK_CLASSES == PAGE_CLASSES
    assert model.base_bytes_per_token == geometry.base_bytes_per_token
    assert LoraShape(rank).residual_bytes_per_token(model) == geometry.bytes_per_token(geometry.rank_class(columns))


def test_an_adapter_counts_both_factors_of_each_target() -> None:
    # q: 16 * (4096 + 4096); v: 16 * (4096 + 1024); 32 layers
    assert LoraShape(16, ("q", "v")).num_params(LLAMA_3_1_8B) == 32 * 16 * (8192 + 5120)


def test_an_adapter_on_neither_k_nor_v_keeps_no_residual() -> None:
    assert LoraShape(16, ("q", "o")).residual_bytes_per_token(LLAMA_3_1_8B) == 0


def test_a_residual_without_k_needs_no_scales() -> None:
    assert LoraShape(16, ("q", "v")).residual_bytes_per_token(QWEN_3_8B) == int(2.25 * KIB)


@pytest.mark.parametrize(
    ("field", "build"),
    [
        ("rank", lambda: LoraShape(129).residual_bytes_per_token(LLAMA_3_1_8B)),
        ("targets", lambda: LoraShape(8, ("q", "w")).num_params(LLAMA_3_1_8B)),
        ("adapters", lambda: Workload(agents=4, adapters=5)),
        ("hidden_size", lambda: shape_of({}, "empty")),
    ],
)
def test_errors_name_the_field(field: str, build) -> None:
    with pytest.raises(InvalidArgument) as error:
        build()
    assert error.value.attributes["field"] == field


def test_a_config_gives_the_known_shape() -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "head_dim": 128,
    }
    assert shape_of(config, "Qwen3-8B") == QWEN_3_8B
