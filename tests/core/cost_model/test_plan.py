"""Plans: what sets the policies apart, and that throughput adds up from its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forkkv_cluster.core.cost_model.cards import card_named
from forkkv_cluster.core.cost_model.memory import Policy
from forkkv_cluster.core.cost_model.plan import context_seconds, make_plan
from forkkv_cluster.core.cost_model.shapes import LLAMA_3_1_8B, QWEN_2_5_7B, LoraShape, Workload
from forkkv_cluster.core.cost_model.work import FLOOR, decode_work, extend_seconds

H200 = card_named("H200")
SIXTEEN = Workload(context=32768, agents=16, adapters=16, turns=3, input=128, output=128)


def test_isolated_prefills_once_an_adapter_and_eager_once() -> None:
    plan = make_plan(LLAMA_3_1_8B, H200, SIXTEEN)
    assert plan[Policy.ISOLATED].context_s / plan[Policy.EAGER].context_s == pytest.approx(16, rel=0.05)
    assert plan[Policy.RESIDUAL].context_s > plan[Policy.ISOLATED].context_s


def test_projecting_eight_adapters_costs_half_a_percent_of_the_linear_work() -> None:
    # x [A_k | A_v] of 8 adapters of rank 16: 256 columns of 4096, beside 218 million weights of a layer
    eight = Workload(context=1024, agents=8, adapters=8)
    plain, _ = context_seconds(Policy.BASE, LLAMA_3_1_8B, H200, eight, FLOOR)
    eager, _ = context_seconds(Policy.EAGER, LLAMA_3_1_8B, H200, eight, FLOOR)
    extra = 2 * 1024 * 32 * 4096 * 256 / 791e12
    assert eager - plain == pytest.approx(extra, rel=1e-6)
    assert extra / (2 * 1024 * LLAMA_3_1_8B.linear_params / 791e12) == pytest.approx(0.0048, abs=0.0001)


def test_a_residual_pass_saves_the_products_of_base_k_and_v_alone() -> None:
    _, isolated = context_seconds(Policy.ISOLATED, LLAMA_3_1_8B, H200, SIXTEEN, FLOOR)
    _, residual = context_seconds(Policy.RESIDUAL, LLAMA_3_1_8B, H200, SIXTEEN, FLOOR)
    assert isolated - residual == pytest.approx(2 * 32768 * 32 * 2 * 4096 * 1024 / 791e12)


def test_a_fork_of_an_eager_context_waits_for_its_own_tokens_alone() -> None:
    plan = make_plan(LLAMA_3_1_8B, H200, SIXTEEN, efficiency=FLOOR)
    own = extend_seconds(LLAMA_3_1_8B, H200, FLOOR, 128, 32768, LoraShape().num_params(LLAMA_3_1_8B))
    assert plan[Policy.EAGER].fork_ttft_s == pytest.approx(own)
    assert plan[Policy.ISOLATED].fork_ttft_s > 50 * own


def test_the_run_adds_up_from_its_parts() -> None:
    made = make_plan(LLAMA_3_1_8B, H200, SIXTEEN, efficiency=FLOOR)[Policy.EAGER]
    step = decode_work(Policy.EAGER, LLAMA_3_1_8B, SIXTEEN, 16, 16, own_len=384).seconds(H200, FLOOR)
    assert made.decode_step_s == made.decode_step_floor_s == step
    assert made.run_s == pytest.approx(made.context_s + 3 * (16 * made.fork_ttft_s + 128 * step))
    assert made.output_tokens_per_s == pytest.approx(16 * 3 * 128 / made.run_s)


def test_agents_that_do_not_fit_decode_in_rounds_and_prefill_each_turn() -> None:
    small = replace(H200, memory_bytes=64 * 2**30)
    roomy = make_plan(LLAMA_3_1_8B, H200, SIXTEEN)[Policy.ISOLATED]
    tight = make_plan(LLAMA_3_1_8B, small, SIXTEEN)[Policy.ISOLATED]
    assert roomy.fits
    assert not tight.fits
    assert tight.batch == tight.capacity < 16
    assert tight.run_s is not None
    assert roomy.run_s is not None
    assert tight.run_s > roomy.run_s + 1.9 * roomy.context_s


def test_a_card_too_small_for_one_agent_says_so() -> None:
    plan = make_plan(QWEN_2_5_7B, card_named("L4"), replace(SIXTEEN, context=2**20))
    assert all(made.output_tokens_per_s is None and not made.fits for made in plan.policies)
    assert plan.ratio(Policy.EAGER) is None


def test_sharing_decodes_faster_than_isolation_and_no_faster_than_no_adapters() -> None:
    plan = make_plan(LLAMA_3_1_8B, H200, SIXTEEN)
    steps = [plan[policy].decode_step_s for policy in (Policy.NO_ADAPTERS, Policy.BASE, Policy.EAGER, Policy.ISOLATED)]
    assert steps == sorted(steps)
    floors = [made.decode_step_floor_s for made in plan.policies]
    assert all(floor < made.decode_step_s for floor, made in zip(floors, plan.policies, strict=True))


def test_ratios_compare_throughput() -> None:
    plan = make_plan(LLAMA_3_1_8B, H200, SIXTEEN)
    assert plan.ratio(Policy.ISOLATED) == 1.0
    eager, isolated = plan[Policy.EAGER], plan[Policy.ISOLATED]
    assert plan.ratio(Policy.EAGER) == eager.output_tokens_per_s / isolated.output_tokens_per_s
