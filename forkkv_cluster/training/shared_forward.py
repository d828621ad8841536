"""A forward pass with gradients under the semantics of each sharing, over the modules of a Transformers model.

A shared context is seen as its K and V, layer by layer, which is all that sharing changes. With x a layer's input after its
norm, x' the base model's, N the norm on K where the family has one, R the rotation:

    isolated   K = R N(x W + x A B)                  V = x W + x A B       the agent's own pass
    base       K = R N(x' W)                         V = x' W
    eager      K = R N(x' W + x' A B)                V = x' W + x' A B     all of the base model's x
    residual   K = R N(x' W + x A B)                 V = x' W + x A B      x of the agent's pass, which attends to just that

The base model's pass carries no gradient; those of A and B for k and v come through the context's own products with them.
With QK-norm ``residual`` is what the engine keeps of it (``forkkv_kernels.reference.qk_norm``): y = x W of the agent's own
pass says how K is rescaled, K = R gamma (rms(y) / rms(x' W) x' W + x A B) / rms(y + x A B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from forkkv_cluster.core.request import Sharing
from forkkv_cluster.engine.models.config import ModelConfig
from forkkv_cluster.training.lora_modules import adapter_part, base_part, project


class KV(NamedTuple):
    """K and V of one layer: [B, Hkv, S, D] each. Before its norm and rotation K is [B, S, Hkv, D], and V with it."""

    k: Tensor
    v: Tensor


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, [B, S, 1, D] each."""

Write = Callable[[int, Tensor], KV]
"""(layer, x [B, S, H]) -> the K and V that this pass attends to, among them its own."""

Attend = Callable[[Tensor, KV, Tensor | None], Tensor]
"""(q [B, Hq, T, D], K and V of S tokens, which of them each q sees [B, T, S], None for a causal pass) -> [B, Hq, T, D]."""


def attend(q: Tensor, kv: KV, mask: Tensor | None) -> Tensor:
    """Attention as ``Attend`` has it."""
    if mask is None:
        return scaled_dot_product_attention(q, kv.k, kv.v, is_causal=True, enable_gqa=True)
    # The heads of a group are stacked as rows of their K and V, which then need no copy for each.
    group = q.shape[1] // kv.k.shape[1]
    rows = q.reshape(q.shape[0], kv.k.shape[1], group * q.shape[2], q.shape[3])
    seen = mask.repeat(1, group, 1).unsqueeze(1)
    return scaled_dot_product_attention(rows, kv.k, kv.v, attn_mask=seen).reshape(q.shape)


class SharedForward:
    """Stateless over a causal language model of a family that the engine serves, with peft's LoRA in it or without.

    ``adapter`` names one of peft's; gradients flow wherever they are enabled and parameters ask for them.
    """

    def __init__(self, model: Any, config: ModelConfig) -> None:
        self._body, self._lm_head = model.model, model.lm_head
        self._config = config

    def context(self, tokens: Tensor, adapter: str, sharing: Sharing) -> list[KV]:
        """What a branch of ``adapter`` sees of contexts [B, C] int64, padded at the end: K and V by layer."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        rotation = self._rotation(positions)
        if sharing is Sharing.ISOLATED:
            return self._keeping(tokens, rotation, adapter, lambda index, x: self._own(index, x, adapter, rotation))
        if sharing is Sharing.RESIDUAL:
            base: list[KV] = []
            self._base_pass(tokens, rotation, lambda index, x, kv: base.append(kv))
            return self._keeping(
                tokens, rotation, adapter, lambda index, x: self._over_shared_base(index, x, base[index], adapter, rotation)
            )
        seen: list[KV] = []
        has_grad, eager = torch.is_grad_enabled(), sharing is Sharing.EAGER

        def project_too(index: int, x: Tensor, kv: KV) -> None:
            with torch.set_grad_enabled(has_grad):
                seen.append(self._finished(index, self._plus_adapter(index, kv, x, adapter) if eager else kv, rotation))

        self._base_pass(tokens, rotation, project_too)
        return seen

    def repaired(self, context: Sequence[KV], tokens: Tensor, chosen: Tensor, adapter: str) -> list[KV]:
        """``context`` of ``tokens`` [1, C] int64, with the tokens at ``chosen`` [n] int64 (ascending) run again by ``adapter``.

        They attend to what ``context`` has of the others and to each other, and theirs are whole K and V: all of them chosen
        is ``isolated``.
        """
        rotation = self._rotation(chosen.unsqueeze(0))
        mask = torch.arange(tokens.shape[1], device=tokens.device) <= chosen.unsqueeze(-1)
        seen: list[KV] = []

        def write(index: int, x: Tensor) -> KV:
            new = self._own(index, x, adapter, rotation)
            seen.append(KV(*(old.index_copy(2, chosen, own) for old, own in zip(context[index], new, strict=True))))
            return seen[-1]

        self._layers(tokens[:, chosen], rotation, adapter, write, mask.unsqueeze(0))
        return seen

    def branches(
        self, context: Sequence[KV], own: Tensor, positions: Tensor, mask: Tensor, adapter: str, attend: Attend = attend
    ) -> Tensor:
        """Own tokens [B, T] int64 at ``positions`` [B, T], run by ``adapter`` -> last hidden states [B, T, H], normalised.

        ``mask`` [B, T, C + T] bool says which of the context and of the own tokens each of them sees.
        """
        rotation = self._rotation(positions)

        def write(index: int, x: Tensor) -> KV:
            new = self._own(index, x, adapter, rotation)
            return KV(*(torch.cat(pair, dim=2) for pair in zip(context[index], new, strict=True)))

        hidden = self._layers(own, rotation, adapter, write, mask, attend)
        return self._norm(self._body.norm, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] fp32, or fp64 of a model in it."""
        logits: Tensor = self._lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    # --- passes over a context -------------------------------------------------------------------------------------

    def _keeping(self, tokens: Tensor, rotation: Rotation, adapter: str, write: Write) -> list[KV]:
        """The adapter's pass, and what it wrote."""
        seen: list[KV] = []

        def write_and_keep(index: int, x: Tensor) -> KV:
            seen.append(write(index, x))
            return seen[-1]

        self._layers(tokens, rotation, adapter, write_and_keep, None)
        return seen

    @torch.no_grad()
    def _base_pass(self, tokens: Tensor, rotation: Rotation, visit: Callable[[int, Tensor, KV], None]) -> None:
        """The base model's pass; ``visit`` gets each layer's x and its products with W, before norm and rotation."""

        def write(index: int, x: Tensor) -> KV:
            kv = self._products(index, x)
            visit(index, x, kv)
            return self._finished(index, kv, rotation)

        self._layers(tokens, rotation, None, write, None)

    def _over_shared_base(self, index: int, x: Tensor, base: KV, adapter: str, rotation: Rotation) -> KV:
        """K and V under ``residual``: base of the base model's pass, the adapter's part of this one."""
        summed = self._plus_adapter(index, base, x, adapter)
        if not self._config.qk_norm:
            return self._finished(index, summed, rotation)
        attention = self._body.layers[index].self_attn
        own = self._heads(base_part(attention.k_proj, x))
        added = adapter_part(attention.k_proj, x, adapter)
        k, scale = base.k * (self._rms(own) / self._rms(base.k)), own
        if added is not None:
            k, scale = k + self._heads(added), own + self._heads(added)
        k = (k / self._rms(scale) * attention.k_norm.weight).to(x.dtype)
        return KV(_rotated(k, rotation).transpose(1, 2), summed.v.transpose(1, 2))

    # --- one pass ---------------------------------------------------------------------------------------------------

    def _layers(
        self,
        tokens: Tensor,
        rotation: Rotation,
        adapter: str | None,
        write: Write,
        mask: Tensor | None,
        attend: Attend = attend,
    ) -> Tensor:
        """All layers over [B, S]; what ``write`` gives is attended to, causally without ``mask`` -> [B, S, H].

        Without ``mask`` it is a pass for its K and V alone, which nobody reads the last layer's output of.
        """
        hidden: Tensor = self._body.embed_tokens(tokens)
        for index, layer in enumerate(self._body.layers):
            x = self._norm(layer.input_layernorm, hidden)
            kv = write(index, x)
            if mask is None and index == self._config.num_layers - 1:
                break
            q = self._heads(project(layer.self_attn.q_proj, x, adapter))
            if self._config.qk_norm:
                q = self._norm(layer.self_attn.q_norm, q)
            attended = attend(_rotated(q, rotation).transpose(1, 2), kv, mask)
            hidden = hidden + project(layer.self_attn.o_proj, attended.transpose(1, 2).flatten(2), adapter)
            x = self._norm(layer.post_attention_layernorm, hidden)
            gated = silu(project(layer.mlp.gate_proj, x, adapter)) * project(layer.mlp.up_proj, x, adapter)
            hidden = hidden + project(layer.mlp.down_proj, gated, adapter)
        return hidden

    def _own(self, index: int, x: Tensor, adapter: str, rotation: Rotation) -> KV:
        return self._finished(index, self._plus_adapter(index, self._products(index, x), x, adapter), rotation)

    def _products(self, index: int, x: Tensor) -> KV:
        """x W of k and v, before norm and rotation."""
        attention = self._body.layers[index].self_attn
        return KV(*(self._heads(base_part(module, x)) for module in (attention.k_proj, attention.v_proj)))

    def _plus_adapter(self, index: int, kv: KV, x: Tensor, adapter: str) -> KV:
        """``kv`` + x A B."""
        attention = self._body.layers[index].self_attn
        parts = (adapter_part(module, x, adapter) for module in (attention.k_proj, attention.v_proj))
        return KV(*(base if part is None else base + self._heads(part) for base, part in zip(kv, parts, strict=True)))

    def _finished(self, index: int, kv: KV, rotation: Rotation) -> KV:
        """K normalised and rotated; both [B, Hkv, S, D]."""
        k = self._norm(self._body.layers[index].self_attn.k_norm, kv.k) if self._config.qk_norm else kv.k
        return KV(_rotated(k, rotation).transpose(1, 2), kv.v.transpose(1, 2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], x.shape[-1] // self._config.head_dim, self._config.head_dim)

    def _norm(self, module: Any, x: Tensor) -> Tensor:
        return rms_norm(x, module.weight.shape, module.weight, self._config.rms_norm_eps)

    def _rms(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + self._config.rms_norm_eps)

    @torch.no_grad()
    def _rotation(self, positions: Tensor) -> Rotation:
        dtype = torch.float64 if self._lm_head.weight.dtype == torch.float64 else torch.float32
        cos, sin = self._body.rotary_emb(torch.empty(0, dtype=dtype, device=positions.device), positions)
        return cos.unsqueeze(2), sin.unsqueeze(2)


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """x [B, S, heads, D] in halves, computed in the rotation's dtype -> x's."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
