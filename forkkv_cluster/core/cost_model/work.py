"""Bytes moved and arithmetic of prefill and decode, and the time that a card's ceilings leave for them.

Decode attention is that of grouped decode (``kernels/forkkv_kernels/_triton/residual_attention_grouped.py``): what agents share
is read once from memory; rows of several agents are the columns of one product for its base part. Residual keys are scored by
B_k folded into the queries, whatever adapters there are (``residual_scores.py``); what one member's residual values make of
another's columns is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from forkkv_cluster.core.cost_model.cards import Card
from forkkv_cluster.core.cost_model.memory import Policy
from forkkv_cluster.core.cost_model.shapes import ELEMENT_BYTES, ModelShape, Workload

ROW_TILE = 16
"""Rows of a matrix instruction: fewer are padded to it."""
GROUP_COLUMNS, RESIDUAL_COLUMNS = 32, 128
"""Of a group with residuals at most: its members times query heads of a kv head, and its members times their rank."""
ROPE_NUMBERS, CHUNK, BASIS = 48, 512, 16
"""What stands for a position's cosines and sines in residual scores (at Llama-3.1's rope_theta; 80 at 1e4), and the functions
among them whose coefficients are worked out once a chunk of keys (``reference/rope_basis.py``)."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the card's ceilings that are expected to be reached; all 1: the floor.

    streaming: weights in decode (3.83 ms were measured where a copy's rate allows 3.3: 0.85 on an H200).
    decode_bytes, decode_flop: of decode attention. prefill: of large linear layers. extend: of prefill attention (torch's
    causal flash attention reached 0.77 on an H200; Triton's is expected to reach two thirds of that).
    """

    streaming: float = 0.85
    decode_bytes: float = 0.9
    decode_flop: float = 0.5
    prefill: float = 0.85
    extend: float = 0.5


FLOOR = Efficiency(1, 1, 1, 1, 1)


class Work(NamedTuple):
    """What one part of a step moves and computes."""

    num_bytes: float
    flop: float

    def seconds(self, card: Card, bytes_share: float, flop_share: float) -> float:
        """The larger of what bytes and arithmetic need."""
        return max(
            self.num_bytes / (card.tb_per_s * 1e12 * bytes_share), self.flop / (card.tflop_per_s * 1e12 * flop_share)
        )  # fmt: skip


class DecodeWork(NamedTuple):
    """One token of every agent of a batch. linears: weights, and the adapters' weights. shared: attention over the shared
    context. own: over the agents' own tokens."""

    linears: Work
    shared: Work
    own: Work

    def seconds(self, card: Card, efficiency: Efficiency) -> float:
        attention = (self.shared, self.own)
        return self.linears.seconds(card, efficiency.streaming, efficiency.prefill) + sum(
            part.seconds(card, efficiency.decode_bytes, efficiency.decode_flop) for part in attention
        )


def padded(rows: float, tile: int) -> float:
    """Rows up to whole tiles."""
    return -(-rows // tile) * tile


def decode_work(policy: Policy, model: ModelShape, workload: Workload, batch: int, adapters: int, own_len: float) -> DecodeWork:
    """A step of ``batch`` agents with ``adapters`` distinct adapters, each ``own_len`` tokens after the shared context."""
    has_adapters = policy is not Policy.NO_ADAPTERS
    lora_params = workload.lora.num_params(model) if has_adapters else 0
    per_row = model.linear_params + model.head_params + lora_params
    linears = Work(model.streamed_bytes + adapters * lora_params * ELEMENT_BYTES, 2.0 * batch * per_row)
    has_residual = policy in (Policy.RESIDUAL, Policy.EAGER)
    copies = adapters if policy is Policy.ISOLATED else 1
    shared = shared_attention(model, workload, batch, adapters, copies, has_residual)
    own = own_attention(model, workload, batch, own_len, has_adapters and policy is not Policy.ISOLATED)
    return DecodeWork(linears, shared, own)


def shared_attention(model: ModelShape, workload: Workload, batch: int, adapters: int, copies: int, has_residual: bool) -> Work:
    """Over ``copies`` of the shared context, all layers; with the residuals of ``adapters`` adapters, or without. Bytes count
    what lies between the two kernels, too."""
    keys, per_layer = workload.context, float(model.num_layers)
    group = model.num_heads // model.num_kv_heads
    rows = copies * padded(batch * group / copies, ROW_TILE)
    num_bytes: float = copies * keys * model.base_bytes_per_token
    flop = per_layer * 4 * keys * rows * model.kv_size
    if has_residual:
        num_bytes += adapters * keys * workload.lora.residual_bytes_per_token(model)
        rank = padded(workload.lora.rank, ROW_TILE)
        heads_of_one = 1 << (group - 1).bit_length()  # as the kernels pad them
        if "k" in workload.lora.targets:  # scores are written, and read, in fp16
            heads = batch * model.num_kv_heads * heads_of_one
            num_bytes += per_layer * keys * heads * 2 * ELEMENT_BYTES
            numbers = ROPE_NUMBERS + BASIS * model.head_dim / CHUNK
            flop += per_layer * keys * heads * 2 * rank * numbers
        if "v" in workload.lora.targets:
            members = max(1, min(GROUP_COLUMNS // heads_of_one, int(RESIDUAL_COLUMNS // rank), batch))
            columns = padded(members * heads_of_one, ROW_TILE)
            flop += per_layer * keys * -(-batch // members) * 2 * members * rank * columns * model.num_kv_heads
    return Work(num_bytes, flop)


def own_attention(model: ModelShape, workload: Workload, batch: int, own_len: float, has_residual: bool) -> Work:
    """Every agent over its own tokens, its rows padded to a tile of their own, all layers."""
    residual = workload.lora.residual_bytes_per_token(model) if has_residual else 0
    rows = padded(model.num_heads / model.num_kv_heads, ROW_TILE)
    flop = 4 * own_len * rows * model.kv_size
    if has_residual:
        flop += own_len * _residual_flop(model, workload, rows)
    return Work(batch * own_len * (model.base_bytes_per_token + residual), batch * model.num_layers * flop)


def _residual_flop(model: ModelShape, workload: Workload, rows: float) -> float:
    """Of one key, layer and adapter: K's residual rebuilt and scored against ``rows`` of each kv head, and P a_v."""
    lora, total = workload.lora, 0.0
    rank = padded(lora.rank, ROW_TILE)
    if "k" in lora.targets:
        total += 2 * rank * model.kv_size + 2 * rows * model.kv_size
    if "v" in lora.targets:
        total += 2 * rank * rows * model.num_kv_heads
    return total


def extend_seconds(
    model: ModelShape,
    card: Card,
    efficiency: Efficiency,
    tokens: int,
    before: int,
    extra_params: float = 0,
    saved_params: float = 0,
) -> float:
    """Running ``tokens`` through all layers after ``before`` cached ones; the head for one row.

    extra_params: of adapters, per token. saved_params: of base modules that need not run again.
    """
    linear = 2.0 * tokens * (model.linear_params + extra_params - saved_params)
    weights = Work(model.streamed_bytes + ELEMENT_BYTES * extra_params, linear)
    pairs = tokens * (before + tokens / 2)
    attention = Work(before * model.base_bytes_per_token, 4.0 * pairs * model.q_size * model.num_layers)
    return weights.seconds(card, efficiency.streaming, efficiency.prefill) + attention.seconds(
        card, efficiency.decode_bytes, efficiency.extend
    )
