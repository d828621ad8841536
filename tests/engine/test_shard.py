"""How a model is cut: what the ranks compute adds up, or lines up, to what the whole computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.engine.layers.lora import LoraFactors
from forkkv_cluster.engine.layers.rotary import RopeSettings
from forkkv_cluster.engine.models.config import ModelConfig
from forkkv_cluster.engine.shard import WHOLE, Shard

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_position=128,
    sliding_window=None,
    rope=RopeSettings(),
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    o_bias=True,
    dtype="float32",
    eos_token_ids=(0,),
)
RANKS = [Shard(rank, 2) for rank in range(2)]
LAYER = "model.layers.0."


def _whole(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))


def test_a_rank_has_its_share_of_heads_and_of_the_mlp_and_the_whole_hidden_state() -> None:
    own = RANKS[1].config(CONFIG)
    assert (own.num_heads, own.num_kv_heads, own.intermediate_size) == (2, 1, 12)
    assert (own.hidden_size, own.head_dim, own.vocab_size) == (16, 8, 64)


@pytest.mark.parametrize("size", [3, 4])
def test_heads_that_cannot_be_cut_evenly_are_refused_by_name(size: int) -> None:
    with pytest.raises(InvalidArgument, match=r"worker\.tensor_parallel.*does not divide num_(attention|key_value)_heads"):
        Shard(0, size).config(CONFIG)


@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_rows_of_a_module_that_reads_the_hidden_state_are_dealt_out_in_order(module: str) -> None:
    name = f"{LAYER}{module}.weight"
    parts = [shard.take(_whole)(name, (8, 16)) for shard in RANKS]
    assert torch.equal(torch.cat(parts), _whole(name, (16, 16)))


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj"])
def test_columns_of_a_module_that_writes_the_hidden_state_are_dealt_out_and_its_bias_is_added_once(module: str) -> None:
    weight, bias = f"{LAYER}{module}.weight", f"{LAYER}{module}.bias"
    takes = [shard.take(_whole) for shard in RANKS]
    x = torch.randn(3, 16)
    parts = [x.chunk(2, 1)[rank] @ take(weight, (16, 8)).T + take(bias, (16,)) for rank, take in enumerate(takes)]
    torch.testing.assert_close(parts[0] + parts[1], x @ _whole(weight, (16, 16)).T + _whole(bias, (16,)))


def test_norms_and_embeddings_are_whole_on_every_rank() -> None:
    for name, shape in (("model.embed_tokens.weight", (64, 16)), (f"{LAYER}input_layernorm.weight", (16,))):
        for shard in RANKS:
            assert torch.equal(shard.take(_whole)(name, shape), _whole(name, shape))


def _lora(module: str, size_in: int, size_out: int) -> dict[str, LoraFactors]:
    return {module: LoraFactors(torch.randn(3, size_in), torch.randn(3, size_out), torch.randn(size_out))}


def test_a_lora_on_a_module_cut_by_outputs_lines_up_to_the_whole_and_shrinks_alike_on_every_rank() -> None:
    whole, x = _lora("k_proj", 16, 12), torch.randn(5, 16)
    parts = [shard.factors(whole)["k_proj"] for shard in RANKS]
    assert torch.equal(x @ parts[0].a.T, x @ parts[1].a.T)
    outs = [x @ part.a.T @ part.b + part.bias for part in parts if part.bias is not None]
    factors = whole["k_proj"]
    assert factors.bias is not None
    torch.testing.assert_close(torch.cat(outs, dim=1), x @ factors.a.T @ factors.b + factors.bias)


def test_a_lora_on_a_module_cut_by_inputs_adds_up_to_the_whole() -> None:
    whole, x = _lora("down_proj", 12, 16), torch.randn(5, 12)
    outs = []
    for rank, shard in enumerate(RANKS):
        part = shard.factors(whole)["down_proj"]
        assert part.bias is not None
        outs.append(x.chunk(2, 1)[rank] @ part.a.T @ part.b + part.bias)
    factors = whole["down_proj"]
    assert factors.bias is not None
    torch.testing.assert_close(outs[0] + outs[1], x @ factors.a.T @ factors.b + factors.bias)


def test_a_model_on_one_rank_is_taken_as_it_is() -> None:
    assert WHOLE.take(_whole) is _whole
    assert WHOLE.config(CONFIG) == CONFIG


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_beyond_the_last_is_refused(rank: int) -> None:
    with pytest.raises(InvalidArgument, match="is none of 2 ranks"):
        Shard(rank, 2)
