"""KV of agents over one context, against numbers derived by hand for Llama-3.1-8B at rank 16."""

from __future__ import annotations

import pytest

from forkkv_cluster.core.cost_model.cards import card_named
from forkkv_cluster.core.cost_model.memory import Policy, adapters_of, capacity, kv_bytes, pool_bytes
from forkkv_cluster.core.cost_model.shapes import LLAMA_3_1_8B, LoraShape, Workload
from forkkv_cluster.core.errors import InvalidArgument

GIB, MIB = 2**30, 2**20
SIXTEEN = Workload(context=32768, agents=16, adapters=16, turns=3, input=128, output=128)


@pytest.mark.parametrize(
    ("policy", "gib"),
    [(Policy.ISOLATED, 64), (Policy.RESIDUAL, 5), (Policy.EAGER, 5), (Policy.BASE, 4), (Policy.NO_ADAPTERS, 4)],
)
def test_sixteen_agents_over_32k(policy: Policy, gib: int) -> None:
    kv = kv_bytes(policy, LLAMA_3_1_8B, SIXTEEN)
    assert kv.base + kv.residual == gib * GIB


def test_own_tokens_keep_base_and_residual() -> None:
    # 3 turns of 256 tokens, 16 agents: 12288 tokens of 128 KiB, and of 2 KiB more with an adapter over shared base KV
    assert kv_bytes(Policy.ISOLATED, LLAMA_3_1_8B, SIXTEEN).own == 12288 * 128 * 1024
    assert kv_bytes(Policy.NO_ADAPTERS, LLAMA_3_1_8B, SIXTEEN).own == 12288 * 128 * 1024
    assert kv_bytes(Policy.EAGER, LLAMA_3_1_8B, SIXTEEN).own == 12288 * 130 * 1024


def test_agents_of_one_adapter_share_its_copy() -> None:
    four_each = Workload(context=32768, agents=16, adapters=4)
    assert kv_bytes(Policy.ISOLATED, LLAMA_3_1_8B, four_each).base == 16 * GIB
    assert kv_bytes(Policy.EAGER, LLAMA_3_1_8B, four_each).residual == 256 * MIB
    assert [adapters_of(agents, four_each) for agents in (1, 4, 5, 32)] == [1, 1, 2, 8]


def test_capacity_is_the_last_number_that_fits() -> None:
    # isolated: 4 GiB + 96 MiB an agent. eager: 4 GiB once, and 64 + 97.5 MiB an agent.
    pool = 20 * GIB
    assert capacity(Policy.ISOLATED, LLAMA_3_1_8B, SIXTEEN, pool) == 4
    assert capacity(Policy.EAGER, LLAMA_3_1_8B, SIXTEEN, pool) == int(16 * 1024 / 161.5)
    for policy in Policy:
        most = capacity(policy, LLAMA_3_1_8B, SIXTEEN, pool)
        assert kv_bytes(policy, LLAMA_3_1_8B, SIXTEEN, most).total <= pool
        assert kv_bytes(policy, LLAMA_3_1_8B, SIXTEEN, most + 1).total > pool


def test_nothing_fits_a_pool_smaller_than_the_context() -> None:
    assert capacity(Policy.EAGER, LLAMA_3_1_8B, SIXTEEN, 4 * GIB) == 0


def test_the_pool_is_what_weights_and_adapters_leave() -> None:
    card = card_named("h100")
    adapter = 2 * LoraShape().num_params(LLAMA_3_1_8B)
    expected = int(0.9 * 81559 * MIB) - 2 * 8_030_261_248 - 16 * adapter - GIB
    assert pool_bytes(LLAMA_3_1_8B, SIXTEEN, card, utilization=0.9, reserve_bytes=GIB) == expected
    assert pool_bytes(LLAMA_3_1_8B, SIXTEEN, card_named("L4"), utilization=0.5, reserve_bytes=GIB) == 0


def test_an_unknown_card_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidArgument, match="H100, H200, A100, L4"):
        card_named("h300")


def test_measured_numbers_replace_the_tables() -> None:
    card = card_named("A100").with_measured(40 * GIB, None, 250.0)
    assert (card.memory_bytes, card.tflop_per_s) == (40 * GIB, 250.0)
    assert card.tb_per_s == card_named("A100").tb_per_s
    assert card.source.startswith("given")
