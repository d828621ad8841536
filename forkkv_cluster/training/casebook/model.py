"""The shape of the casebook model: a Llama of a few layers, made of a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ModelShape:
    num_layers: int = 2
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_heads: int = 4
    head_dim: int = 64
    tie_embeddings: bool = True
    max_position: int = 4096
    rope_theta: float = 100_000.0
    """High, so that half of a head's dimensions hardly turn over a context: facts are found by content, at any distance."""


def new_model(shape: ModelShape, vocab_size: int, special: tuple[int, int, int], seed: int) -> Any:
    """A LlamaForCausalLM with fresh float32 weights; ``special`` are the ids of padding, begin and end."""
    from transformers import LlamaConfig, LlamaForCausalLM

    pad, bos, eos = special
    config = LlamaConfig(
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)
