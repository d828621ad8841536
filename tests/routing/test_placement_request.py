from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterRef, ModelInfo, SamplingParams, Sharing
from forkkv_cluster.core.request_builder import Envelope, PromptSharing, RequestBuilder
from forkkv_cluster.routing.placement_request import placement_request, residual_chains
from forkkv_cluster.testing.requests import MODEL_DIGEST, adapter_ref, context_request, generate_request

PLANNER, CRITIC = adapter_ref("planner"), adapter_ref("critic")
TOKENS = range(5, 18)  # 13 tokens: 3 blocks of 4, and one more.


@pytest.mark.parametrize("sharing", [Sharing.EAGER, Sharing.RESIDUAL])
def test_an_adapter_that_shares_context_needs_its_residual(sharing: Sharing) -> None:
    placement = placement_request(generate_request(TOKENS, context_len=8, adapter=PLANNER, sharing=sharing))
    assert (placement.residual_of, placement.adapter, placement.semantics) == (PLANNER.digest, PLANNER.digest, str(sharing))
    assert (len(placement.context), len(placement.own), placement.num_blocks) == (2, 1, 4)


@pytest.mark.parametrize("sharing", [Sharing.ISOLATED, Sharing.BASE])
def test_isolated_and_base_need_the_adapter_but_no_residual(sharing: Sharing) -> None:
    placement = placement_request(generate_request(TOKENS, context_len=8, adapter=PLANNER, sharing=sharing))
    assert (placement.residual_of, placement.adapter) == (None, PLANNER.digest)


def test_the_base_model_needs_neither() -> None:
    placement = placement_request(generate_request(TOKENS, context_len=8, declared=(PLANNER,)))
    assert (placement.residual_of, placement.adapter) == (None, None)


def test_an_eager_context_pass_is_judged_by_its_first_adapter() -> None:
    placement = placement_request(context_request(TOKENS, declared=(PLANNER, CRITIC)))
    assert (placement.residual_of, placement.adapter) == (PLANNER.digest, None)


def test_a_context_pass_under_residual_writes_base_only() -> None:
    request = context_request(TOKENS, declared=(PLANNER,), sharing=Sharing.RESIDUAL)
    assert placement_request(request).residual_of is None
    assert residual_chains(request) == ()


def test_under_eager_all_declared_adapters_will_have_residuals() -> None:
    request = generate_request(TOKENS, context_len=8, adapter=PLANNER, declared=(PLANNER, CRITIC))
    context = request.prefix.context
    assert residual_chains(request) == ((PLANNER.digest, "eager", context), (CRITIC.digest, "eager", context))


@pytest.mark.parametrize("sharing", [Sharing.EAGER, Sharing.RESIDUAL])
def test_an_alora_needs_no_residual_and_reads_canonical_blocks_up_to_its_invocation(sharing: Sharing) -> None:
    checker = AdapterRef("checker", AdapterDigest("c" * 32), (31, 32))
    model = ModelInfo("tiny", MODEL_DIGEST, 300, 512, 64, "float32")
    builder = RequestBuilder(model, block_size=4, namespace_of="{}{}".format)
    prompt = np.array([*TOKENS, 31, 32], dtype=np.int32)
    choice = PromptSharing(sharing, shared_prefix_tokens=8)
    built = builder.prompt(prompt, checker, choice, SamplingParams(max_tokens=4), Envelope("r", "t"))
    request = replace(built, declared=(checker, PLANNER))
    placement = placement_request(request)
    assert (placement.residual_of, placement.adapter) == (None, checker.digest)
    assert (len(placement.context), len(placement.own)) == (3, 0)
    projected = ((PLANNER.digest, "eager", request.prefix.context[:2]),)
    assert residual_chains(request) == (projected if sharing is Sharing.EAGER else ())


def test_under_residual_only_the_agents_own_will_be_there() -> None:
    request = generate_request(TOKENS, context_len=8, adapter=PLANNER, declared=(PLANNER, CRITIC), sharing=Sharing.RESIDUAL)
    assert residual_chains(request) == ((PLANNER.digest, "residual", request.prefix.context),)
