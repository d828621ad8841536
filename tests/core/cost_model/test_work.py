"""Bytes and arithmetic of steps, against numbers derived by hand for one layer of Llama-3.1-8B."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forkkv_cluster.core.cost_model.cards import Card
from forkkv_cluster.core.cost_model.memory import Policy
from forkkv_cluster.core.cost_model.shapes import LLAMA_3_1_8B, LoraShape, Workload
from forkkv_cluster.core.cost_model.work import (
    FLOOR,
    Work,
    decode_work,
    extend_seconds,
    own_attention,
    shared_attention,
)

LAYERS, GFLOP = 32, 1e9
THIRTY_TWO = Workload(context=32768, agents=32, adapters=32)
ROUND = Card("round", 0, tb_per_s=1.0, tflop_per_s=1.0, source="a test")
FAST = replace(ROUND, tflop_per_s=1e6)


def test_stacked_rows_of_32_agents_take_17_gflop_a_layer() -> None:
    # 1024 query rows x 32768 keys x 128 elements x 2 products x 2
    work = shared_attention(LLAMA_3_1_8B, THIRTY_TWO, batch=32, adapters=32, copies=1, has_residual=False)
    assert work.flop / LAYERS == 1024 * 32768 * 128 * 4
    assert work.flop / LAYERS / GFLOP == pytest.approx(17.2, abs=0.1)
    assert work.num_bytes == 4 * 2**30


def test_residual_scores_and_values_of_32_adapters_take_64_gflop_a_layer() -> None:
    plain = shared_attention(LLAMA_3_1_8B, THIRTY_TWO, 32, adapters=32, copies=1, has_residual=False)
    work = shared_attention(LLAMA_3_1_8B, THIRTY_TWO, 32, adapters=32, copies=1, has_residual=True)
    rows = 32 * 32  # of all agents and heads
    scores = 32768 * rows * 2 * 16 * (48 + 4)  # a chunk's coefficients are 16 * 128 products an element, over 512 keys
    values = 32768 * 4 * 2 * (8 * 16) * 32 * 8  # 4 groups of 8 members, each one's residual with all 32 columns
    assert (work.flop - plain.flop) / LAYERS == scores + values
    assert work.flop / LAYERS / GFLOP == pytest.approx(81.6, abs=0.3)
    assert work.num_bytes - plain.num_bytes == 32 * 32768 * 2048 + LAYERS * 32768 * rows * 4


def test_agents_of_one_adapter_save_bytes_and_no_arithmetic() -> None:
    eight = shared_attention(LLAMA_3_1_8B, replace(THIRTY_TWO, adapters=8), 32, adapters=8, copies=1, has_residual=True)
    work = shared_attention(LLAMA_3_1_8B, THIRTY_TWO, 32, adapters=32, copies=1, has_residual=True)
    assert eight.flop == work.flop
    assert work.num_bytes - eight.num_bytes == 24 * 32768 * 2048


def test_few_agents_are_padded_to_a_tile() -> None:
    two = Workload(context=32768, agents=2, adapters=2)
    work = shared_attention(LLAMA_3_1_8B, two, 2, adapters=2, copies=1, has_residual=True)
    base = 16 * 8 * 32768 * 128 * 4
    assert work.flop / LAYERS == base + 32768 * (64 * 2 * 16 * 52 + 2 * (2 * 16) * 16 * 8)


def test_a_rank_of_64_leaves_room_for_two_members_in_a_group() -> None:
    wide = Workload(context=32768, agents=32, adapters=32, lora=LoraShape(64, ("q", "v")))
    work = shared_attention(LLAMA_3_1_8B, wide, 32, adapters=32, copies=1, has_residual=True)
    assert work.flop / LAYERS == 1024 * 32768 * 128 * 4 + 32768 * 16 * 2 * (2 * 64) * 16 * 8


def test_without_lora_on_k_nothing_is_scored() -> None:
    no_k = Workload(context=32768, agents=32, adapters=32, lora=LoraShape(16, ("q", "v")))
    work = shared_attention(LLAMA_3_1_8B, no_k, 32, adapters=32, copies=1, has_residual=True)
    assert work.flop / LAYERS == 1024 * 32768 * 128 * 4 + 32768 * 4 * 2 * (8 * 16) * 32 * 8
    assert work.num_bytes == 4 * 2**30 + 32 * 32768 * 2048  # a residual page has room for both planes


def test_isolated_copies_pad_the_rows_of_each() -> None:
    # 4 rows of one agent's kv head fill a tile of 16
    work = shared_attention(LLAMA_3_1_8B, THIRTY_TWO, 32, adapters=32, copies=32, has_residual=False)
    assert work.num_bytes == 128 * 2**30
    assert work.flop / LAYERS == 4 * 1024 * 32768 * 128 * 4


def test_own_tokens_are_read_by_each_agent() -> None:
    work = own_attention(LLAMA_3_1_8B, THIRTY_TWO, batch=32, own_len=100, has_residual=True)
    assert work.num_bytes == 32 * 100 * 130 * 1024


def test_every_decode_step_reads_linears_and_head_once() -> None:
    plain = decode_work(Policy.NO_ADAPTERS, LLAMA_3_1_8B, THIRTY_TWO, batch=32, adapters=32, own_len=0)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert plain.linears.num_bytes == 2 * (32 * layer + 128256 * 4096)
    assert plain.linears.flop == 2 * 32 * (32 * layer + 128256 * 4096)
    adapted = decode_work(Policy.EAGER, LLAMA_3_1_8B, THIRTY_TWO, batch=32, adapters=8, own_len=0)
    assert adapted.linears.num_bytes - plain.linears.num_bytes == 8 * 2 * LoraShape().num_params(LLAMA_3_1_8B)


def test_the_larger_of_bytes_and_arithmetic_takes_the_time() -> None:
    assert Work(2e12, 1e12).seconds(ROUND, 1, 1) == 2.0
    assert Work(1e12, 3e12).seconds(ROUND, 1, 1) == 3.0
    assert Work(1e12, 3e12).seconds(ROUND, 0.25, 1) == 4.0


def test_prefill_is_linear_work_and_half_a_square_of_attention() -> None:
    model, tokens = LLAMA_3_1_8B, 8192
    linear = 2 * tokens * model.linear_params
    attention = 4 * (tokens**2 / 2) * 4096 * 32
    assert extend_seconds(model, ROUND, FLOOR, tokens, 0) == pytest.approx((linear + attention) / 1e12)


def test_a_short_extend_reads_weights_and_the_cached_context() -> None:
    seconds = extend_seconds(LLAMA_3_1_8B, FAST, FLOOR, 1, 32768)
    assert seconds == pytest.approx((LLAMA_3_1_8B.streamed_bytes + 4 * 2**30) / 1e12)
