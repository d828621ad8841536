"""The decoder that every family of ``registry`` runs on: our own forward pass over paged KV.

With QK-norm (Qwen3) base pages hold the normalised K, as a request without an adapter reads it. An adapter's K of shared
tokens is not that plus its part, so its residual also keeps what rescales both (``forkkv_kernels.reference.qk_norm``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from forkkv_kernels.ops.rms_norm import add_rms_norm_, rms_norm
from forkkv_kernels.ops.silu_mul import silu_mul
from forkkv_kernels.ops.store_kv import HeadNorms, store_kv
from torch import Tensor

from forkkv_cluster.engine.attention import Attention
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.linear import Linear
from forkkv_cluster.engine.models.config import ModelConfig
from forkkv_cluster.engine.step_inputs import StepRows
from forkkv_cluster.engine.step_lora import Product, StepAdapters


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """H hidden, I intermediate, Q = Hq * D, KV = Hkv * D.

    input_norm, post_norm [H]; q_norm, k_norm [D] where the family has them;
    qkv H -> Q + 2 KV and o Q -> H, each with a bias where the family has one;
    gate_up H -> 2 I; down I -> H.
    """

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """embed [V, H], norm [H], lm_head H -> V (over the same weights when tied)."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear


class Decoder:
    """Stateless over its weights: all state of a step is in its arguments."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self._weights = weights
        self.reduce: Callable[[Tensor], Tensor] | None = None
        """With several ranks, what the o and down products go through: [T, H] of this one -> the sum over all of them."""
        self.on_layer: Callable[[int, Tensor], None] | None = None
        """For measurements: called after each layer with its index and the hidden states [T, H] of all rows."""

    @property
    def k_norms(self) -> tuple[Tensor, ...]:
        """Weight [D] of K's norm by layer; empty where the family has none."""
        return tuple(layer.k_norm for layer in self._weights.layers if layer.k_norm is not None)

    def forward(self, rows: StepRows, attention: Attention, lora: StepAdapters, kv: KVBuffers) -> Tensor:
        """Run all rows, write their KV, return the last hidden states [R + n, H] of ``rows.output_rows``."""
        hidden = self._weights.embed[rows.token_ids]
        delta: Product | None = None
        for index, weights in enumerate(self._weights.layers):
            x = self._add_norm_(hidden, delta, weights.input_norm)
            q = self._project_and_store(index, x, rows, lora, kv)
            if index == self.config.num_layers - 1 and len(rows.output_rows) == 0:
                break  # A pass for its KV alone: nobody reads what the last layer would compute.
            attended = attention.run(index, q).flatten(1)
            x = self._add_norm_(hidden, self._reduced(lora.linear(index, "o", weights.o, attended)), weights.post_norm)
            activated = silu_mul(*lora.linear(index, "gate_up", weights.gate_up, x))
            delta = self._reduced(lora.linear(index, "down", weights.down, activated))
            if self.on_layer is not None:
                self.on_layer(index, hidden + delta.whole())
        if delta is not None:
            hidden += delta.whole()
        return hidden[rows.output_rows]

    def _add_norm_(self, hidden: Tensor, delta: Product | None, weight: Tensor) -> Tensor:
        """hidden += delta in place, then its norm."""
        out, added = delta if delta is not None else (None, None)
        normed: Tensor = add_rms_norm_(hidden, out, weight, self.config.rms_norm_eps, added)
        return normed

    def _reduced(self, product: Product) -> Product:
        return product if self.reduce is None else Product(self.reduce(product.whole()))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H], as ``forward`` returns it -> logits [n, V] fp32."""
        final = rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps)
        return self._weights.lm_head(final).float()

    def _project_and_store(self, index: int, x: Tensor, rows: StepRows, lora: StepAdapters, kv: KVBuffers) -> Tensor:
        """Project q, k, v; write KV of this layer; return q [T, Hq, D] rotated."""
        config, weights = self.config, self._weights.layers[index]
        qkv, added = lora.linear(index, "qkv", weights.qkv, x)
        shape = (len(x), config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        heads, added = qkv.view(shape), added.view(shape) if added is not None else None
        norms = None
        if weights.q_norm is not None and weights.k_norm is not None:
            norms = HeadNorms(weights.q_norm, weights.k_norm, config.rms_norm_eps)
        q: Tensor = store_kv(heads, rows.cos_sin, norms, rows.base_slots, *kv.base(index), added)
        lora.store_residuals(index, x, heads[:, config.num_heads : config.num_heads + config.num_kv_heads])
        return q


def load_decoder(config: ModelConfig, take: Callable[[str, tuple[int, ...]], Tensor]) -> Decoder:
    """Assemble the model; ``take(name, shape)`` gives one checkpoint tensor of that shape in the target dtype."""
    embed = take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    layers = tuple(_load_layer(config, f"model.layers.{index}.", take) for index in range(config.num_layers))
    norm = take("model.norm.weight", (config.hidden_size,))
    lm_head = embed if config.tie_embeddings else take("lm_head.weight", (config.vocab_size, config.hidden_size))
    return Decoder(config, DecoderWeights(embed, layers, norm, Linear(lm_head)))


def _load_layer(config: ModelConfig, prefix: str, take: Callable[[str, tuple[int, ...]], Tensor]) -> LayerWeights:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    qkv_bias = None
    if config.qkv_bias:
        qkv_bias = torch.cat([take(f"{attention}{name}.bias", (size,)) for name, size in sizes.items()])
    return LayerWeights(
        input_norm=take(prefix + "input_layernorm.weight", (hidden,)),
        qkv=Linear(torch.cat([take(f"{attention}{name}.weight", (size, hidden)) for name, size in sizes.items()]), qkv_bias),
        q_norm=take(attention + "q_norm.weight", (config.head_dim,)) if config.qk_norm else None,
        k_norm=take(attention + "k_norm.weight", (config.head_dim,)) if config.qk_norm else None,
        o=Linear(
            take(attention + "o_proj.weight", (hidden, q_size)),
            take(attention + "o_proj.bias", (hidden,)) if config.o_bias else None,
        ),
        post_norm=take(prefix + "post_attention_layernorm.weight", (hidden,)),
        gate_up=Linear(torch.cat([take(f"{mlp}{name}_proj.weight", (intermediate, hidden)) for name in ("gate", "up")])),
        down=Linear(take(mlp + "down_proj.weight", (hidden, intermediate))),
    )
