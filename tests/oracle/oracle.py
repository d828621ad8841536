"""What a branch must answer under each sharing, as a recurrence over whole sequences: no pages, no chunks, no cache.

Written from the semantics and the formulas alone; it shares no code with the engine or the kernels. Everything is dense
and slow. Notation: context c, own tokens o, adapter i, layer input x (after the input norm).

    base KV       K = R(x W_k)              V = x W_v
    residual      R(x A_k B_k s)            x A_v B_v s
    isolated      one pass of the adapter over c + o
    base          c as the base model wrote it; o by the adapter
    eager         c as the base model wrote it, plus the adapter's residual of the *base model's* x
    residual      c's base KV as the writer wrote it, plus the adapter's residual of *its own* x, computed while it
                  attends to just that sum

With QK-norm, K = R(N(x W_k)) where N(k) = gamma k / rms(k), and the sums stand inside of N:

    eager         K = R(N(x W_k + x A_k B_k s)), x the base model's
    residual      with y = x W_k of its own x, k = y + x A_k B_k s, and b the writer's x W_k:
                  K = R(gamma (rms(y) b / rms(b) + x A_k B_k s) / rms(k))
                  The shared K knows b's direction and not its length: the agent's own pass gives both lengths. Where the
                  writer is the agent, b = y, and K = R(N(k)).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

KV = tuple[Tensor, Tensor]
"""K (rotated) and V of some tokens in one layer: [n, Hkv, D] each."""


@dataclass(frozen=True)
class OracleAdapter:
    """W += s A^T B^T by module path, for example ``layers.0.self_attn.q_proj``: (A [r, in], B [out, r], s); plus s * bias."""

    factors: dict[str, tuple[Tensor, Tensor, float]]
    biases: dict[str, Tensor] = field(default_factory=dict)

    def delta(self, module: str, x: Tensor) -> Tensor | float:
        if module not in self.factors:
            return 0.0
        a, b, scaling = self.factors[module]
        return ((x @ a.T) @ b.T + self.biases.get(module, 0.0)) * scaling


NO_ADAPTER = OracleAdapter({})


class Oracle:
    """A checkpoint of the Llama family with plain rotary embedding: biases, QK-norm and tied embeddings as its tensors say."""

    def __init__(self, model_dir: Path, dtype: torch.dtype = torch.float32) -> None:
        config = json.loads((model_dir / "config.json").read_text())
        self.dtype = dtype
        self.weights = {name: tensor.to(dtype) for name, tensor in load_file(model_dir / "model.safetensors").items()}
        self.num_layers = config["num_hidden_layers"]
        self.num_heads, self.num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.eps = config["rms_norm_eps"]
        self.has_qk_norm = "model.layers.0.self_attn.k_norm.weight" in self.weights
        self.theta = config["rope_parameters"]["rope_theta"]

    def adapter(self, directory: Path) -> OracleAdapter:
        """Plain LoRA saved by peft, one alpha for all modules."""
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        factors, biases = {}, {}
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix(".lora_A.weight")
                b = tensors[stem + ".lora_B.weight"]
                module = stem.removeprefix("base_model.model.model.")
                factors[module] = (a.to(self.dtype), b.to(self.dtype), config["lora_alpha"] / len(a))
                if stem + ".lora_B.bias" in tensors:
                    biases[module] = tensors[stem + ".lora_B.bias"].to(self.dtype)
        return OracleAdapter(factors, biases)

    def logits(
        self,
        context: Sequence[int],
        own: Sequence[int],
        adapter: OracleAdapter | None,
        sharing: str,
        writer: OracleAdapter | None = None,
    ) -> Tensor:
        """Logits [len(own), V] at each own token. ``writer`` None is the base model, the canonical writer."""
        agent = adapter or NO_ADAPTER
        if sharing == "isolated":
            logits, _, _ = self._run([*context, *own], 0, agent, [], self._full(agent))
            return logits[len(context) :]
        seen = self._context_seen(context, agent, sharing, writer)
        logits, _, _ = self._run(own, len(context), agent, seen, self._full(agent))
        return logits

    def _context_seen(
        self, context: Sequence[int], agent: OracleAdapter, sharing: str, writer: OracleAdapter | None
    ) -> list[KV]:
        who_writes = writer or NO_ADAPTER
        _, inputs, _ = self._run(context, 0, who_writes, [], self._full(who_writes))
        positions = torch.arange(len(context))
        if sharing in ("base", "eager"):
            lora = agent if sharing == "eager" else NO_ADAPTER
            return [self._full(lora)(layer, x, positions) for layer, x in enumerate(inputs)]
        if sharing == "residual":

            def over_shared_base(layer: int, x: Tensor, where: Tensor) -> KV:
                base, delta = self._product(layer, inputs[layer]), self._residual(layer, x, agent)
                k, v = _plus(base, delta)
                if self.has_qk_norm:
                    own, _ = self._product(layer, x)
                    k = (base[0] * self._rms(own) / self._rms(base[0]) + delta[0]) / self._rms(own + delta[0])
                    k = k * self.weights[f"model.layers.{layer}.self_attn.k_norm.weight"]
                return self._rotate(k, where), v

            _, _, seen = self._run(context, 0, agent, [], over_shared_base)
            return seen
        raise ValueError(f"the oracle knows no sharing {sharing!r}")

    def _run(
        self,
        tokens: Sequence[int],
        start: int,
        lora: OracleAdapter,
        past: list[KV],
        new_kv: Callable[[int, Tensor, Tensor], KV],
    ) -> tuple[Tensor, list[Tensor], list[KV]]:
        """One pass over ``tokens`` after ``past``: logits [n, V], each layer's x [n, H], each layer's new K and V."""
        w = self.weights
        positions = torch.arange(start, start + len(tokens))
        hidden = w["model.embed_tokens.weight"][torch.tensor(list(tokens), dtype=torch.long)]
        inputs, new = [], []
        for layer in range(self.num_layers):
            name = f"layers.{layer}."
            x = self._norm(hidden, w[f"model.{name}input_layernorm.weight"])
            inputs.append(x)
            new.append(new_kv(layer, x, positions))
            k, v = (torch.cat((p, n)) for p, n in zip(past[layer], new[layer], strict=True)) if past else new[layer]
            q = self._linear(f"{name}self_attn.q_proj", x, lora).view(len(x), -1, self.head_dim)
            q = self._rotate(self._head_norm(f"{name}self_attn.q_norm", q), positions)
            attended = self._attend(q, k, v, positions)
            hidden = hidden + self._linear(f"{name}self_attn.o_proj", attended, lora)
            x = self._norm(hidden, w[f"model.{name}post_attention_layernorm.weight"])
            gate = torch.nn.functional.silu(self._linear(f"{name}mlp.gate_proj", x, lora))
            hidden = hidden + self._linear(f"{name}mlp.down_proj", gate * self._linear(f"{name}mlp.up_proj", x, lora), lora)
        lm_head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return self._norm(hidden, w["model.norm.weight"]) @ lm_head.T, inputs, new

    def _full(self, lora: OracleAdapter) -> Callable[[int, Tensor, Tensor], KV]:
        """K and V of an ordinary pass: base product plus the adapter's part of the same x."""

        def new_kv(layer: int, x: Tensor, positions: Tensor) -> KV:
            k, v = _plus(self._product(layer, x), self._residual(layer, x, lora))
            return self._rotate(self._head_norm(f"layers.{layer}.self_attn.k_norm", k), positions), v

        return new_kv

    def _product(self, layer: int, x: Tensor) -> KV:
        """x W_k, before norm and rotation, and x W_v."""
        k, v = (self._linear(f"layers.{layer}.self_attn.{m}_proj", x, NO_ADAPTER) for m in "kv")
        return self._heads(k), self._heads(v)

    def _residual(self, layer: int, x: Tensor, lora: OracleAdapter) -> KV:
        zero = x.new_zeros(len(x), self.num_kv_heads * self.head_dim)
        k, v = (zero + lora.delta(f"layers.{layer}.self_attn.{m}_proj", x) for m in "kv")
        return self._heads(k), self._heads(v)

    def _linear(self, module: str, x: Tensor, lora: OracleAdapter) -> Tensor:
        bias = self.weights.get(f"model.{module}.bias", torch.zeros(1, dtype=self.dtype))
        return x @ self.weights[f"model.{module}.weight"].T + bias + lora.delta(module, x)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        group = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(self.head_dim)
        hidden = torch.arange(len(k))[None, :] > positions[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("hts,shd->thd", weights, v).flatten(1)

    def _rms(self, x: Tensor) -> Tensor:
        return torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / self._rms(x) * weight

    def _head_norm(self, module: str, x: Tensor) -> Tensor:
        """x [n, heads, D], normalised over D where the model does so."""
        return self._norm(x, self.weights[f"model.{module}.weight"]) if self.has_qk_norm else x

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = self.head_dim // 2
        angles = positions[:, None].double() * self.theta ** (-torch.arange(half).double() / half)
        cos, sin = angles.cos().to(self.dtype)[:, None], angles.sin().to(self.dtype)[:, None]
        x1, x2 = x[..., :half], x[..., half:]
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.num_kv_heads, self.head_dim)


def _plus(left: KV, right: KV) -> KV:
    return left[0] + right[0], left[1] + right[1]
