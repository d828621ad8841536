"""The shape of the casebook model, a Llama of a few layers, and the weights that it begins with.

Recall by two attention layers is found late, if at all, from random weights: a value must know the name that stands before
it, the place that asks must know the name too, and the last layer must match the two; none of it pays before all is there.
From random weights that plateau was not left in 160 million tokens. So training begins near a circuit that recalls:

    first layer   head h looks h + 1 tokens back and notes what stands there, in dimensions of their own (the *note*)
    last layer    looks for places whose note is what the next token's note here will be, and copies the token that is there

Everything else begins at random, and all of it is trained: what counts as alike, which words matter, names that stand
further away, the other layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModelShape:
    num_layers: int = 3
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_heads: int = 4
    head_dim: int = 128
    max_position: int = 4096
    rope_theta: float = 1_000_000.0
    """High, so that half of a head's dimensions hardly turn over a context: facts are found by content, at any distance."""


def new_model(shape: ModelShape, vocab_size: int, special: tuple[int, int, int], seed: int) -> Any:
    """A LlamaForCausalLM with float32 weights of ``seed``; ``special`` are the ids of padding, begin and end."""
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
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        _Start(shape).write(model.model)
    return model


def circuit_of(model: Any) -> list[torch.nn.Parameter]:
    """What training must change slowly: steps of Adam are as large for a matrix that is right as for one that is not, and at
    a learning rate of 1e-3 a hundred of them have drowned the circuit."""
    layers = model.model.layers
    return [*layers[0].self_attn.parameters(), *layers[-1].self_attn.parameters()]


class _Start:
    """Dimensions of the residual stream, as training begins: the token's, the note's, and the last one, the same for all."""

    peak = 30.0  # attention score of the place that a head of the first layer looks at
    token_norm = 0.75
    noted_norm = 0.5  # of one token in a note
    likeness = 5.0  # attention score of one token that two notes share
    copied = 3.0  # norm of what the last layer copies
    noise = 0.25  # of the random weights that write into the residual stream

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._num_token = shape.hidden_size * 5 // 8
        self._num_note = min(shape.head_dim // 2 - 4, (shape.hidden_size - self._num_token - 1) // 2 * 2)
        self._projection = _orthonormal(self._num_note, self._num_token)
        # What stands h tokens back is noted turned h times, so that a note tells the order; one turn more, and it is the note
        # that the next token will have.
        self._turn = _orthonormal(self._num_note, self._num_note)

    def write(self, decoder: Any) -> None:
        for layer in decoder.layers:  # quiet beside the circuit, or what it adds would drown a note
            layer.self_attn.v_proj.weight *= self.noise
            layer.self_attn.o_proj.weight *= self.noise
            layer.mlp.down_proj.weight *= self.noise
        self._embed(decoder.embed_tokens.weight)
        self._look_back(decoder.layers[0].self_attn)
        self._match(decoder.layers[-1].self_attn)

    @property
    def _note(self) -> slice:
        return slice(self._num_token, self._num_token + self._num_note)

    def _rows(self, head: int) -> slice:
        return slice(head * self._shape.head_dim, (head + 1) * self._shape.head_dim)

    def _embed(self, weight: Tensor) -> None:
        weight *= self.token_norm / self._num_token**0.5 / weight.std()
        weight[:, self._num_token :] = 0.0
        weight[:, -1] = self.token_norm

    def _look_back(self, attention: Any) -> None:
        """u R(i - j - h - 1) u is highest where j = i - h - 1, u's energy being on dimensions that turn fast."""
        shape, half = self._shape, self._shape.head_dim // 2
        turns = shape.rope_theta ** (-torch.arange(half) / half)
        energy = turns.sqrt() / turns.sqrt().sum()
        scale = (self.peak * shape.head_dim**0.5 / (shape.hidden_size / 2)) ** 0.5  # half of RMSNorm's energy is the last dim's
        normed = (shape.hidden_size / 2 * self._num_note / self._num_token) ** 0.5  # norm of a projected token
        gain = (self.noted_norm / normed) ** 0.5
        for head in range(shape.num_heads):
            rows = self._rows(head)
            angle = (head + 1) * turns
            attention.q_proj.weight[rows, -1] += torch.cat([energy.sqrt(), torch.zeros(half)]) * scale
            attention.k_proj.weight[rows, -1] += torch.cat([energy.sqrt() * angle.cos(), energy.sqrt() * angle.sin()]) * scale
            noted = slice(rows.start, rows.start + self._num_note)
            attention.v_proj.weight[noted, : self._num_token] += gain * self._projection
            attention.o_proj.weight[self._note, noted] += gain * torch.linalg.matrix_power(self._turn, head + 1)

    def _match(self, attention: Any) -> None:
        shape, half = self._shape, self._shape.head_dim // 2
        energy = 2 * self.token_norm**2 + shape.num_heads * self.noted_norm**2
        normed = shape.hidden_size / energy * self.noted_norm**2  # squared norm of a noted token after RMSNorm
        gain = (self.likeness * shape.head_dim**0.5 / normed) ** 0.5
        copied = shape.num_heads * shape.head_dim / self._num_token * (shape.hidden_size / energy) ** 0.5 * self.token_norm
        copy_gain = (self.copied / copied) ** 0.5
        slow = torch.cat(
            [torch.arange(half - self._num_note // 2, half), torch.arange(shape.head_dim - self._num_note // 2, shape.head_dim)]
        )
        for head in range(shape.num_heads):
            rows = self._rows(head)
            dims = rows.start + slow
            attention.k_proj.weight[dims, self._note] += gain * torch.eye(self._num_note)
            attention.q_proj.weight[dims, self._note] += gain * self._turn
            attention.q_proj.weight[dims, : self._num_token] += gain * self._turn @ self._projection
            copy = _orthonormal(min(shape.head_dim, self._num_token), self._num_token)
            rows = slice(rows.start, rows.start + len(copy))
            attention.v_proj.weight[rows, : self._num_token] += copy_gain * copy
            attention.o_proj.weight[: self._num_token, rows] += copy_gain * copy.T


def _orthonormal(num_rows: int, num_columns: int) -> Tensor:
    columns: Tensor = torch.linalg.qr(torch.randn(num_columns, num_rows))[0]
    return columns.T
