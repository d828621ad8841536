"""The shape of the casebook model: a Llama of a few layers, made of a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


_PEAK = 30.0
"""Attention score of the place that a head of the first layer begins by looking at."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    num_layers: int = 2
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_heads: int = 8
    head_dim: int = 32
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
    model = LlamaForCausalLM(config)
    _look_back(model, shape)
    return model


@torch.no_grad()
def _look_back(model: Any, shape: ModelShape) -> None:
    """Head h of the first layer begins by attending to the token h + 1 places back.

    To recall, a value must know the name that stands a few tokens before it, and so must the place that asks; neither helps
    before the other is there, and from random weights that plateau was not left in 100 million tokens. All embeddings get
    one direction in common, which the first layer's queries and keys turn into a place: with u's energy on the quickly
    turning dimensions, u R(i - j - h - 1) u has its peak at j = i - h - 1.
    """
    common = torch.randn(shape.hidden_size)
    common /= common.norm()
    embedding = model.model.embed_tokens.weight
    embedding += common * embedding.std() * shape.hidden_size**0.5
    half = shape.head_dim // 2
    turns = shape.rope_theta ** (-torch.arange(half) / half)
    energy = turns.sqrt()
    energy /= energy.sum()
    # After RMSNorm the common part of a token's embedding has half of its energy.
    scale = (_PEAK * shape.head_dim**0.5 / (shape.hidden_size / 2)) ** 0.5
    attention = model.model.layers[0].self_attn
    for head in range(shape.num_heads):
        rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        angle = (head + 1) * turns
        query = torch.cat([energy.sqrt(), torch.zeros(half)]) * scale
        key = torch.cat([energy.sqrt() * angle.cos(), energy.sqrt() * angle.sin()]) * scale
        attention.q_proj.weight[rows] += torch.outer(query, common)
        attention.k_proj.weight[rows] += torch.outer(key, common)
